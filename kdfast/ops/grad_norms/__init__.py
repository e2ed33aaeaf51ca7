"""Per-sample gradient norms of whole networks, without forming the gradients."""

from kdfast.ops.grad_norms.api import grad_norms

__all__ = ["grad_norms"]
