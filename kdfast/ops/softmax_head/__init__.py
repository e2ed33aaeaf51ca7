"""Closed forms for a softmax head, the last linear layer of a classifier: gradient norms, curvature, influence.

With features h in R^D (a 1 appended for the bias), logits z = W h and a loss of softmax(z), everything second-order
about W factors into the features and C x C curvatures; no per-sample gradient is ever made. ``features`` may be a
tensor, a memory-mapped array, or an iterable of blocks; all functions go over them a tile at a time, and what they
return carries no gradient. On a CUDA device the checks of values wait for the device.
"""

from __future__ import annotations

from kdfast.ops.softmax_head.hvp import head_hvp
from kdfast.ops.softmax_head.influence import head_influence, head_leave_one_out, head_self_influence
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
