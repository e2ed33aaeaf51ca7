"""Distillation: the loop, its losses and its schedule."""
