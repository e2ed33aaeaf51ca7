"""``kd_loss`` on a GPU: launch the Triton kernels of ``triton_dense`` and ``triton_topk``.

No call synchronizes with the device. A label, a teacher row or a class id out of range is clamped, and the loss and
gradient of its row become NaN. ``KDFAST_AUTOTUNE=1`` times several numbers of warps at the first call for each number
of classes. Without it nothing is timed, so that the first call may be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.ops.kd_loss.call import KDCall
from kdfast.ops.kd_loss.triton_dense import dense_kernel, tile_shape
from kdfast.ops.kd_loss.triton_topk import topk_kernel

__all__ = ["kd_loss", "scale_kernel", "scale_rows", "weight_sum_kernel"]


@triton.jit
def weight_sum_kernel(
    label_ptr,  # (N,) int64
    weights_ptr,  # (N,) float
    mass_ptr,  # () float32, out
    n,
    label_stride,
    ignore_index,
    HAS_LABELS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the weights of the non-ignored rows, in one program, so that the order of additions is fixed."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        r = start + tl.arange(0, BLOCK).to(tl.int64)
        live = r < n
        if HAS_LABELS:
            live = live & (tl.load(label_ptr + r * label_stride, mask=live, other=ignore_index) != ignore_index)
        if HAS_WEIGHTS:
            total += tl.load(weights_ptr + r, mask=live, other=0.0).to(tl.float32)
        else:
            total += tl.where(live, 1.0, 0.0)
    tl.store(mass_ptr, tl.sum(total, 0))


@triton.jit
def scale_kernel(
    grad_ptr,  # (N, C) contiguous
    out_ptr,  # (N, C) contiguous, may be grad_ptr
    factor_ptr,  # () or (N,) float32
    size,
    c,
    factor_stride,
    scale,
    PER_ROW: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write grad * factor * scale to out; in place, return at once if the product of the factors is one."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    if PER_ROW:
        factor = tl.load(factor_ptr + (at // c) * factor_stride, mask=mask, other=0.0) * scale
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (g * factor).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        factor = tl.load(factor_ptr) * scale
        if not IN_PLACE or factor != 1.0:
            g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, (g * factor).to(out_ptr.dtype.element_ty), mask=mask)


def kd_loss(call: KDCall, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Compute the loss and the gradient of the logits; arguments and results as ``native.kd_loss``."""
    call = call.replace(
        logits=call.logits.resolve_neg(),
        teacher=call.teacher.resolve_neg(),
        weights=None if call.weights is None else call.weights.resolve_neg().contiguous(),
    )
    row_losses = call.logits.new_empty(call.logits.shape[0], dtype=torch.float32)
    grad = call.logits.new_empty(call.logits.shape if need_grad else (0,))
    if call.logits.shape[0] > 0:
        with device_of(call.logits):
            _launch(call, row_losses, grad if need_grad else None)
    return (row_losses if call.reduction == "none" else row_losses.sum()), grad


def _launch(call: KDCall, row_losses: Tensor, grad: Tensor | None) -> None:
    logits, teacher, labels, rows = call.logits, call.teacher, call.labels, call.rows
    n, c = logits.shape
    mass = _weight_sum(call) if call.reduction == "mean" else None
    pointers = [row_losses if x is None else x for x in (labels, rows, call.weights, mass)]
    numbers = [
        logits.stride(0), logits.stride(1), teacher.stride(0), teacher.stride(1),
        0 if labels is None else labels.stride(0), 0 if rows is None else rows.stride(0), call.ignore_index,
        float(call.temperature), 1.0 - call.alpha, float(call.kl_factor), call.grad_scale(),
    ]  # fmt: skip
    flags = {
        "USE_CE": call.use_ce, "REVERSE": call.reverse, "GRAD": grad is not None, "HAS_LABELS": labels is not None,
        "HAS_ROWS": rows is not None, "HAS_WEIGHTS": call.weights is not None, "HAS_MASS": mass is not None,
        "POWER": {1.0: 0, 2.0: 1, 4.0: 2}.get(float(call.temperature), 3) if call.use_ce and call.use_kl else 0,
    }  # fmt: skip
    out = (row_losses, row_losses if grad is None else grad)
    if call.classes is None or call.tail is None or not call.use_kl:
        shape = tile_shape(n, c)
        kernel = _tuned(dense_kernel, tuple(shape.items()))
        flags |= {"USE_KL": call.use_kl, "WIDE": _needs_wide_offsets(logits, teacher)}
        flags |= {"ALIGN": _alignment(logits, teacher)}
        grid = (triton.cdiv(n, shape["ROWS"]),)
        kernel[grid](logits, teacher, *pointers, *out, n, c, teacher.shape[0], *numbers, **flags)
    else:
        k = teacher.shape[1]
        block = min(4096, max(16, triton.next_power_of_2(c)))
        shape = {"BLOCK": block, "K_BLOCK": triton.next_power_of_2(k), "num_warps": max(4, block // 512)}
        operands = (logits, teacher, call.classes.contiguous(), call.tail.resolve_neg().contiguous(), *pointers)
        topk_kernel[(n,)](*operands, *out, n, c, teacher.shape[0], k, *numbers, **flags, **shape)


def scale_rows(grad: Tensor, factor: Tensor, scale: float, *, in_place: bool) -> Tensor:
    """Return ``grad * factor * scale``, rounded once; as ``native.scale_rows``, but without reading the factor."""
    is_scalar = factor.dim() == 0 or factor.stride(0) == 0
    out = grad if in_place else torch.empty_like(grad)
    size = grad.numel()
    if size:
        stride = 0 if is_scalar else factor.stride(0)
        block = 4096
        with device_of(grad):
            scale_kernel[(triton.cdiv(size, block),)](
                grad, out, factor, size, grad.shape[1], stride, scale,
                PER_ROW=not is_scalar, IN_PLACE=in_place, BLOCK=block, num_warps=8,
            )  # fmt: skip
    return out


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Select the tensor's device for launches; do nothing for the CPU tensors of Triton's interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _needs_wide_offsets(*matrices: Tensor) -> bool:
    """Whether the offset of a column may need more than 31 bits."""
    return any(x.shape[1] * x.stride(1) >= 2**31 for x in matrices)


def _alignment(*matrices: Tensor) -> int:
    """Largest power of two up to 16 that divides the number of classes and the row strides."""
    common = math.gcd(16, *(x.shape[1] for x in matrices), *(x.stride(0) for x in matrices))
    return common & -common


def _weight_sum(call: KDCall) -> Tensor:
    """Sum of the weights of non-ignored rows, the divisor of a mean; on the device."""
    labels, weights, logits = call.labels, call.weights, call.logits
    n = logits.shape[0]
    if labels is None and weights is None:
        return logits.new_full((), n, dtype=torch.float32)
    mass = logits.new_empty((), dtype=torch.float32)
    weight_sum_kernel[(1,)](
        mass if labels is None else labels, mass if weights is None else weights, mass, n,
        0 if labels is None else labels.stride(0), call.ignore_index,
        HAS_LABELS=labels is not None, HAS_WEIGHTS=weights is not None, BLOCK=1024,
    )  # fmt: skip
    return mass


@functools.cache
def _tuned(kernel: Any, shape: tuple[tuple[str, int], ...]) -> Any:
    """The kernel for one tile shape, with the warps of ``tile_shape`` or, if KDFAST_AUTOTUNE=1, the fastest number."""
    options = dict(shape)
    warps = options.pop("num_warps")
    if os.environ.get("KDFAST_AUTOTUNE") == "1" and os.environ.get("TRITON_INTERPRET") != "1":
        candidates = sorted({max(1, warps // 2), warps, min(32, warps * 2)})
        configs = [triton.Config(options, num_warps=w) for w in candidates]
        return triton.autotune(configs, key=["c"])(kernel)
    return _Fixed(kernel, {**options, "num_warps": warps})


class _Fixed:
    """A kernel with a fixed tile shape, called like an autotuned one."""

    def __init__(self, kernel: Any, options: dict[str, int]) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self.kernel[grid], **self.options)
