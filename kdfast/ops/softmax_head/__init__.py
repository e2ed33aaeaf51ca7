"""Closed forms for a softmax head, the last linear layer of a classifier: gradient norms, curvature and influence.

For features h in R^D (a 1 appended for the bias), logits z = W h and a loss of softmax(z), the gradient and the Hessian
with respect to W factor into features and C x C curvatures, so no per-sample gradient is ever formed. ``features`` may
be a tensor, a memory-mapped array, or an iterable of blocks; every function reads it one tile at a time, and results
carry no gradient. On a CUDA device, validating values synchronizes with the device.
"""

from __future__ import annotations

from kdfast.ops.softmax_head.hvp import head_hvp
from kdfast.ops.softmax_head.influence import head_influence, head_self_influence
from kdfast.ops.softmax_head.leave_one_out import head_leave_one_out
from kdfast.ops.softmax_head.newton import head_logits, head_newton
from kdfast.ops.softmax_head.norms import head_grad_norms
from kdfast.ops.softmax_head.solve import head_solve

__all__ = [
    "head_grad_norms",
    "head_hvp",
    "head_influence",
    "head_leave_one_out",
    "head_logits",
    "head_newton",
    "head_self_influence",
    "head_solve",
]
