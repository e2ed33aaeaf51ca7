"""Per-sample gradient norms of whole networks, without forming the gradients."""

from kdfast.ops.grad_norms.api import grad_norms
from kdfast.ops.grad_norms.layers import register_grad_norms

__all__ = ["grad_norms", "register_grad_norms"]
