"""Teachers: evaluate them, and cache their logits and features."""
