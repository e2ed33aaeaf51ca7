"""``kd_loss`` on GPUs: launches the kernels of ``kd_dense_triton`` and ``kd_topk_triton``.

Nothing waits for the device. A label, a teacher row or a class id outside its range is clamped, and its row's loss and
gradient become NaN. ``KDFAST_AUTOTUNE=1`` times a few numbers of warps at the first call of each number of classes;
without it nothing is ever timed (inside a CUDA graph's capture, for example).
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

from kdfast.ops.kd_loss.triton_dense import dense_kernel, tile_shape
from kdfast.ops.kd_loss.triton_topk import topk_kernel

__all__ = ["kd_loss", "mass_kernel", "scale_kernel", "scale_rows"]


@triton.jit
def mass_kernel(
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
    """Sum of the weights of the counted rows; one program, so that the order of the additions is always the same."""
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
    """Write grad * factor * scale to out; leaves at once, decided on the device, when that changes nothing."""
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


def kd_loss(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor,
    rows: Tensor | None,
    classes: Tensor | None,
    tail: Tensor | None,
    weights: Tensor | None,
    alpha: float,
    temperature: float,
    t_squared: bool,
    ignore_index: int,
    reduction: str,
    reverse: bool,
    hold: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss (scalar, or (N,) for "none") in float32 and its gradient times ``hold``; arguments as ``native.kd_loss``."""
    logits, teacher = logits.resolve_neg(), teacher.resolve_neg()
    n, c = logits.shape
    row_losses = logits.new_empty(n, dtype=torch.float32)
    grad = logits.new_empty(logits.shape if need_grad else (0,))
    weights = None if weights is None else weights.resolve_neg().contiguous()
    if n == 0:
        return (row_losses if reduction == "none" else row_losses.sum()), grad
    with device_of(logits):
        mass = _mass(labels, weights, logits, ignore_index) if reduction == "mean" else None
        pointers = [row_losses if x is None else x for x in (labels, rows, weights, mass)]
        numbers = [
            logits.stride(0), logits.stride(1), teacher.stride(0), teacher.stride(1),
            0 if labels is None else labels.stride(0), 0 if rows is None else rows.stride(0), ignore_index,
            float(temperature), 1.0 - alpha, float(alpha * temperature**2 if t_squared else alpha), hold,
        ]  # fmt: skip
        use_ce, use_kl = alpha < 1, alpha > 0
        flags = {
            "USE_CE": use_ce, "REVERSE": reverse, "GRAD": need_grad, "HAS_LABELS": labels is not None,
            "HAS_ROWS": rows is not None, "HAS_WEIGHTS": weights is not None, "HAS_MASS": mass is not None,
            "POWER": {1.0: 0, 2.0: 1, 4.0: 2}.get(float(temperature), 3) if use_ce and use_kl else 0,
        }  # fmt: skip
        out = (row_losses, grad if need_grad else row_losses)
        if classes is None or tail is None or not use_kl:
            shape = tile_shape(n, c)
            grid = (triton.cdiv(n, shape["ROWS"]),)
            kernel = _tuned(dense_kernel, tuple(shape.items()))
            flags |= {"USE_KL": use_kl, "WIDE": _wide(logits, teacher), "ALIGN": _alignment(logits, teacher)}
            kernel[grid](logits, teacher, *pointers, *out, n, c, teacher.shape[0], *numbers, **flags)
        else:
            k = teacher.shape[1]
            block = min(4096, max(16, triton.next_power_of_2(c)))
            shape = {"BLOCK": block, "K_BLOCK": triton.next_power_of_2(k), "num_warps": max(4, block // 512)}
            sizes = (n, c, teacher.shape[0], k)
            operands = (logits, teacher, classes.contiguous(), tail.resolve_neg().contiguous(), *pointers)
            topk_kernel[(n,)](*operands, *out, *sizes, *numbers, **flags, **shape)
    return (row_losses if reduction == "none" else row_losses.sum()), grad


def scale_rows(grad: Tensor, factor: Tensor, scale: float, *, in_place: bool) -> Tensor:
    """``grad * factor * scale``, rounded once; as ``native.scale_rows``, but the device finds out what is one."""
    single = factor.dim() == 0 or factor.stride(0) == 0
    out = grad if in_place else torch.empty_like(grad)
    size = grad.numel()
    if size:
        stride = 0 if single else factor.stride(0)
        block = 4096
        with device_of(grad):
            scale_kernel[(triton.cdiv(size, block),)](
                grad, out, factor, size, grad.shape[1], stride, scale,
                PER_ROW=not single, IN_PLACE=in_place, BLOCK=block, num_warps=8,
            )  # fmt: skip
    return out


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device to launch on; nothing for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _wide(*matrices: Tensor) -> bool:
    """Whether a column's offset may need more than 31 bits."""
    return any(x.shape[1] * x.stride(1) >= 2**31 for x in matrices)


def _alignment(*matrices: Tensor) -> int:
    """Largest power of two up to 16 that divides the number of classes and the rows' strides."""
    common = math.gcd(16, *(x.shape[1] for x in matrices), *(x.stride(0) for x in matrices))
    return common & -common


def _mass(labels: Tensor | None, weights: Tensor | None, like: Tensor, ignore_index: int) -> Tensor:
    """What a mean divides by, on the device."""
    n = like.shape[0]
    if labels is None and weights is None:
        return like.new_full((), n, dtype=torch.float32)
    mass = like.new_empty((), dtype=torch.float32)
    mass_kernel[(1,)](
        mass if labels is None else labels, mass if weights is None else weights, mass, n,
        0 if labels is None else labels.stride(0), ignore_index,
        HAS_LABELS=labels is not None, HAS_WEIGHTS=weights is not None, BLOCK=1024,
    )  # fmt: skip
    return mass


@functools.cache
def _tuned(kernel: Any, shape: tuple[tuple[str, int], ...]) -> Any:
    """The kernel for one tile shape, with its warps as ``tile_shape`` says or, when asked for, timed."""
    options = dict(shape)
    warps = options.pop("num_warps")
    if os.environ.get("KDFAST_AUTOTUNE") == "1" and os.environ.get("TRITON_INTERPRET") != "1":
        candidates = sorted({max(1, warps // 2), warps, min(32, warps * 2)})
        configs = [triton.Config(options, num_warps=w) for w in candidates]
        return triton.autotune(configs, key=["c"])(kernel)
    return _Fixed(kernel, {**options, "num_warps": warps})


class _Fixed:
    """A kernel whose tile is decided, called as an autotuned one is."""

    def __init__(self, kernel: Any, options: dict[str, int]) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self.kernel[grid], **self.options)
