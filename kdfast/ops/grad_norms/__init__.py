"""Norms and other functions of per-sample gradients of whole networks, without forming the gradients."""

from kdfast.ops.grad_norms.api import fisher_diagonal, grad_dots, grad_norms
from kdfast.ops.grad_norms.layers import register_grad_norms

__all__ = ["fisher_diagonal", "grad_dots", "grad_norms", "register_grad_norms"]
