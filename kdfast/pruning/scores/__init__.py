"""Pruning scores: one number per training sample; higher means harder."""
