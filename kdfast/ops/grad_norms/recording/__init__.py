"""Recorded forward passes: calls of layers, operations on parameters, where the samples are, and one backward pass."""
