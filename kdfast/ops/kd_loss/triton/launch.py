"""``kd_loss`` on a GPU: launch the Triton kernels of ``dense``, ``divergences`` and ``topk``.

No call synchronizes with the device. A label, a teacher row or a class id out of range is clamped, and the loss and
gradient of its row become NaN. ``KDFAST_AUTOTUNE=1`` times several numbers of warps at the first call for each number
of classes. Without it nothing is timed. Before a call is captured in a CUDA graph, one like it, whose tensors have the
same alignment, must have compiled its kernel.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import torch
import triton
from torch import Tensor

from kdfast.ops.kd_loss.call import KDCall
from kdfast.ops.kd_loss.triton.dense import dense_kernel
from kdfast.ops.kd_loss.triton.divergences import divergence_kernel
from kdfast.ops.kd_loss.triton.tiles import tile_shape
from kdfast.ops.kd_loss.triton.topk import launch_topk
from kdfast.ops.triton_rows import device_of, scale_rows, weight_sums

__all__ = ["kd_loss", "scale_rows"]

SWEPT = {"jsd": 16, "dkd": 32, "standardized": 16}
"""Elements that a thread has of a tile in rows of several tiles; the most without spilling registers (sm_90)."""


def kd_loss(call: KDCall, need_grad: bool, *, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the loss and the gradient of the logits; arguments and results as ``native.kd_loss``."""
    call = call.replace(
        logits=call.logits.resolve_neg(),
        teacher=call.teacher.resolve_neg(),
        weights=None if call.weights is None else call.weights.resolve_neg().contiguous(),
    )
    row_losses = call.logits.new_empty(call.logits.shape[0], dtype=torch.float32)
    if grad is None or not need_grad:
        grad = call.logits.new_empty(call.logits.shape if need_grad else (0,))
    if call.logits.shape[0] > 0:
        with device_of(call.logits):
            _launch(call, row_losses, grad if need_grad else None)
    return (row_losses if call.reduction == "none" else row_losses.sum()), grad


def _launch(call: KDCall, row_losses: Tensor, grad: Tensor | None) -> None:
    logits, teacher, labels, rows = call.logits, call.teacher, call.labels, call.rows
    n, c = logits.shape
    sums, share = None, 1.0
    if call.reduction == "mean":
        if labels is None and call.weights is None:
            share = 1.0 / n
        else:
            sums = weight_sums(labels, call.weights, call.ignore_index)
    pointers = [row_losses if x is None else x for x in (labels, rows, call.weights, sums)]
    numbers = [
        logits.stride(0), logits.stride(1), teacher.stride(0), teacher.stride(1),
        0 if labels is None else labels.stride(0), 0 if rows is None else rows.stride(0), call.ignore_index,
        1.0 if call.temperatures is not None else float(call.temperature),
        (1.0 if call.alphas is not None else 1.0 - call.alpha) * share, _kl_factor(call) * share, call.grad_scale(),
    ]  # fmt: skip
    flags: dict[str, Any] = {
        "USE_CE": call.use_ce, "GRAD": grad is not None,
        "HAS_LABELS": labels is not None, "HAS_ROWS": rows is not None, "HAS_WEIGHTS": call.weights is not None,
        "HAS_MASS": sums is not None,
        "POWER": _power(call),
    }  # fmt: skip
    out = (row_losses, row_losses if grad is None else grad)
    if call.classes is None or call.tail is None or not call.use_kl:
        align, temperature = _alignment(logits, teacher), numbers[7] if call.use_kl else 1.0
        is_kl = call.divergence == "kl" or not call.use_kl
        vector, swept = min(align, 16 // logits.element_size()), 32 if is_kl else SWEPT[call.divergence]
        shape = tile_shape(c, vector, call.use_kl and call.reverse, swept)
        kernel = _tuned(dense_kernel if is_kl else divergence_kernel, tuple(shape.items()))
        flags |= {"WIDE": _needs_wide_offsets(logits, teacher), "ALIGN": align, **_own_numbers(call)}
        ce_factor, kl_factor, grad_scale = numbers[8:]
        slopes = ce_factor * grad_scale, kl_factor * grad_scale / temperature
        numbers[7:] = [ce_factor, kl_factor, math.log2(math.e) / temperature, *slopes]
        if is_kl:
            flags |= {"USE_KL": call.use_kl, "REVERSE": call.use_kl and call.reverse}
        else:
            flags |= {"DIVERGENCE": call.divergence}
            numbers += [float(call.first_weight), float(call.second_weight)]
        grid = (triton.cdiv(n, shape["ROWS"]),)
        kernel[grid](logits, teacher, *pointers, *out, n, c, teacher.shape[0], *numbers, **flags)
    else:
        flags |= {"REVERSE": call.reverse, "WIDE": _needs_wide_offsets(logits), "ALIGN": _alignment(logits)}
        classes, tail = call.classes.contiguous(), call.tail.resolve_neg().contiguous()
        launch_topk(logits, teacher, classes, tail, *pointers, *out, numbers=numbers, flags=flags)


def _kl_factor(call: KDCall) -> float:
    """Factor of the divergence, without what each row has of its own."""
    alpha = 1.0 if call.alphas is not None else call.alpha
    return alpha * call.temperature**2 if call.t_squared and call.temperatures is None else alpha


def _power(call: KDCall) -> int:
    """POWER of the kernels, see ``exp_at_one``."""
    if not (call.use_ce and call.use_kl):
        return 0
    return 3 if call.temperatures is not None else {1.0: 0, 2.0: 1, 4.0: 2}.get(float(call.temperature), 3)


def _own_numbers(call: KDCall) -> dict[str, Any]:
    """Return the arguments about alpha and temperature of each row and about label smoothing; None if there is none."""
    alphas, temperatures = (
        None if x is None else x.resolve_neg().contiguous() for x in (call.alphas, call.temperatures)
    )
    smoothing = call.label_smoothing if call.use_ce and call.label_smoothing > 0 else None
    own = {"alphas_ptr": alphas, "temperatures_ptr": temperatures, "smoothing": smoothing}
    return {**own, "T_SQUARED": call.t_squared and temperatures is not None}


def _needs_wide_offsets(*matrices: Tensor) -> bool:
    """Whether the offset of a column may need more than 31 bits."""
    return any(x.shape[1] * x.stride(1) >= 2**31 for x in matrices)


def _alignment(*matrices: Tensor) -> int:
    """Largest power of two up to 16 that divides the number of classes and the row strides."""
    common = math.gcd(16, *(x.shape[1] for x in matrices), *(x.stride(0) for x in matrices))
    return common & -common


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
