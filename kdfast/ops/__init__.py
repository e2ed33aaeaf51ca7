"""Operators: pure functions on tensors, no files, no state."""
