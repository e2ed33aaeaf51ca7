"""Triton kernel of ``kd_loss`` for the divergences other than KL: losses and gradient in one launch.

The rows are those of the dense kernel, see ``tiles``; each divergence is computed by a module of its own. What the
label adds to the gradient is one store per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton.common import own_numbers
from kdfast.ops.kd_loss.triton.decoupled import decoupled
from kdfast.ops.kd_loss.triton.jensen_shannon import jensen_shannon
from kdfast.ops.kd_loss.triton.program import find_rows, row_operands, smoothed_target
from kdfast.ops.kd_loss.triton.standardized import standardized
from kdfast.ops.kd_loss.triton.tiles import store_zeros

__all__ = ["divergence_kernel"]


@triton.jit
def divergence_kernel(
    z_ptr,  # (N, C) student logits, strides z_row, z_col
    t_ptr,  # (M, C) teacher logits, strides t_row, t_col
    label_ptr,  # (N,) int64
    rows_ptr,  # (N,) int64 teacher row of each sample
    weights_ptr,  # (N,) float
    mass_ptr,  # (PARTS,) float32, whose sum is the divisor of a mean
    loss_ptr,  # (N,) float32, out
    grad_ptr,  # (N, C) contiguous, out
    n,
    c,
    m,
    z_row,
    z_col,
    t_row,
    t_col,
    label_stride,
    rows_stride,
    ignore_index,
    ce_factor,
    kl_factor,
    scale,  # log2(e) / T
    ce_slope,  # factor of the cross-entropy in the gradient
    kl_slope,  # factor of the divergence in the gradient, over T
    first_weight,  # of the two parts of the divergence, as in KDCall
    second_weight,
    DIVERGENCE: tl.constexpr,
    USE_CE: tl.constexpr,
    POWER: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_MASS: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STEPS: tl.constexpr,
    TILES: tl.constexpr,
    LAST_STEPS: tl.constexpr,
    LAST_FULL: tl.constexpr,
    alphas_ptr=None,  # (N,) alpha of each row
    temperatures_ptr=None,  # (N,) T of each row
    smoothing=None,  # label smoothing
    T_SQUARED: tl.constexpr = False,
):
    """Compute losses and gradient of ROWS rows; DIVERGENCE is "jsd", "dkd" or "standardized", the rest as for KL."""
    # The values do not change, but the compiler learns that it may load vectors of ALIGN elements.
    c = c // ALIGN * ALIGN
    z_row = z_row // ALIGN * ALIGN
    t_row = t_row // ALIGN * ALIGN
    r, exists, indices, columns = find_rows(
        label_ptr, rows_ptr, n, c, m, label_stride, rows_stride, ignore_index,
        True, HAS_LABELS, HAS_ROWS, WIDE, ROWS, LANES, VECTOR,
    )  # fmt: skip
    live, label = indices[0], indices[2]
    grad_base = grad_ptr + r * c
    ignored = exists & (live == 0)
    if tl.max(ignored.to(tl.int32), 0) != 0:
        tl.store(loss_ptr + r, tl.zeros((ROWS,), tl.float32), mask=ignored)
        if GRAD:
            store_zeros(grad_base, columns, c, ignored, (TILES - 1) * STEPS + LAST_STEPS)
    if tl.max(live.to(tl.int32), 0) != 0:
        factor, operands = row_operands(
            z_ptr, t_ptr, weights_ptr, mass_ptr, r, indices, (z_row, z_col, t_row, t_col), HAS_WEIGHTS, HAS_MASS
        )
        # Triton 3.6 cannot return None from a function, so this stands in both kernels.
        numbers = (scale, ce_factor, kl_factor, ce_slope, kl_slope)
        hard, soft = live, None
        if alphas_ptr is not None or temperatures_ptr is not None:
            numbers, hard, soft = own_numbers(numbers, r, live, alphas_ptr, temperatures_ptr, T_SQUARED, ROWS)
        flat = None
        if smoothing is not None:
            z_label = tl.load(operands[0] + label * z_col, mask=hard, other=0.0).to(tl.float32)
            offset, smooth, flat = smoothed_target(
                smoothing, z_label, operands, columns, c, live, hard, factor, numbers, TILES, STEPS, LAST_STEPS
            )
        parts = (first_weight, second_weight)
        if DIVERGENCE == "jsd":
            loss, gradient = jensen_shannon(
                operands, grad_base, columns, c, live, label, factor, numbers, parts,
                USE_CE, POWER, GRAD, TILES, STEPS, LAST_STEPS, LAST_FULL, hard, soft, flat,
            )  # fmt: skip
        elif DIVERGENCE == "dkd":
            loss, gradient = decoupled(
                operands, grad_base, columns, c, live, label, factor, numbers, parts,
                USE_CE, POWER, GRAD, TILES, STEPS, LAST_STEPS, LAST_FULL, hard, soft, flat,
            )  # fmt: skip
        else:
            loss, gradient = standardized(
                operands, grad_base, columns, c, live, label, factor, numbers,
                USE_CE, GRAD, TILES, STEPS, LAST_STEPS, LAST_FULL, hard, soft, flat,
            )  # fmt: skip
        if smoothing is not None:
            loss -= factor * numbers[1] * smoothing * tl.where(hard, offset, 0.0)
            gradient += smooth - flat
        tl.store(loss_ptr + r, loss, mask=live)
        if GRAD and (USE_CE or DIVERGENCE == "dkd"):
            tl.debug_barrier()  # after the store of the same element by another thread
            tl.store(grad_base + label, gradient.to(grad_ptr.dtype.element_ty), mask=live)
