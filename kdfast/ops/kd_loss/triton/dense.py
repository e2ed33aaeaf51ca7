"""Triton kernel of ``kd_loss`` for teachers with all classes: losses and gradient in one launch.

The number of instructions limits the kernel, so that the one-hot term of the gradient is left to one store per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton.common import LN2, known, own_numbers
from kdfast.ops.kd_loss.triton.gradient import slope, store_gradient, sweep_gradients
from kdfast.ops.kd_loss.triton.program import find_rows, row_operands, smoothed_target
from kdfast.ops.kd_loss.triton.softmax import sweep_sums, terms, tile_softmax
from kdfast.ops.kd_loss.triton.tiles import store_zeros

__all__ = ["dense_kernel"]


@triton.jit
def finish(
    tops, sums, z_label, factor, numbers, USE_CE: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Return the losses and the coefficients of the gradient that ``slope`` takes, (ROWS,)."""
    top_z, top_t, origin = tops
    sum_e1, sum_e, sum_u, cross = sums
    scale, ce_factor, kl_factor, ce_slope, kl_slope = numbers
    loss = factor * 0.0
    hard, soft, other = factor, factor, factor
    if USE_CE:
        loss = ce_factor * (LN2 * tl.log2(sum_e1) - (z_label - top_z))
        hard = factor * ce_slope * (1.0 / sum_e1)
    if USE_KL:
        inverse_e, inverse_u = 1.0 / sum_e, 1.0 / sum_u
        # Not the difference of two logarithms: at a high temperature the ratio is close to 1, and their rounding errors
        # would remain.
        ratio = tl.log2(sum_e / sum_u)
        soft = factor * kl_slope * inverse_e
        if REVERSE:
            mean = cross * scale * inverse_e
            kl = -mean - (ratio + (origin - top_t) * scale)
            other = soft * (LN2 * scale)
            soft *= LN2 * mean
        else:
            kl = cross * scale * inverse_u + ratio
            other = factor * kl_slope * inverse_u
        loss += kl_factor * (LN2 * kl)
    return loss * factor, (hard, soft, other)


@triton.jit
def dense_kernel(
    z_ptr,  # (N, C) student logits, strides z_row, z_col
    t_ptr,  # (M, C) teacher logits, strides t_row, t_col
    label_ptr,  # (N,) int64
    rows_ptr,  # (N,) int64 teacher row of each sample
    weights_ptr,  # (N,) float
    mass_ptr,  # () float32, divisor of a mean
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
    scale,  # log2(e) / T, or log2(e) without a divergence
    ce_slope,  # factor of the cross-entropy in the gradient
    kl_slope,  # factor of the divergence in the gradient, over T
    USE_CE: tl.constexpr,
    USE_KL: tl.constexpr,
    REVERSE: tl.constexpr,
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
    """Compute losses and gradient of ROWS rows.

    WIDE: the offset of a column may exceed 31 bits. ALIGN divides C and the row strides. LAST_STEPS is the number of
    vectors of the last of TILES tiles, of which LAST_FULL need no mask. POWER is as for ``exp_at_one``.
    """
    # The values do not change, but the compiler learns that it may load vectors of ALIGN elements.
    c = c // ALIGN * ALIGN
    z_row = z_row // ALIGN * ALIGN
    t_row = t_row // ALIGN * ALIGN
    r, exists, indices, columns = find_rows(
        label_ptr, rows_ptr, n, c, m, label_stride, rows_stride, ignore_index,
        USE_KL, HAS_LABELS, HAS_ROWS, WIDE, ROWS, LANES, VECTOR,
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
        z_label, t_label = factor, factor
        if USE_CE:
            z_label = tl.load(operands[0] + label * z_col, mask=live, other=0.0).to(tl.float32)
            if USE_KL and GRAD:
                t_label = tl.load(operands[2] + label * t_col, mask=live, other=0.0).to(tl.float32)
                if soft is not None:
                    t_label = tl.where(soft, t_label, z_label)
        flat = None
        if smoothing is not None:
            offset, smooth, flat = smoothed_target(
                smoothing, z_label, operands, columns, c, live, hard, factor, numbers, TILES, STEPS, LAST_STEPS
            )
        if TILES == 1:
            _, tops, all_terms, sums = tile_softmax(
                operands, columns, c, live, numbers[0], USE_KL, REVERSE, POWER, LAST_STEPS, LAST_FULL, None, soft
            )  # fmt: skip
        else:
            tops, sums = sweep_sums(
                operands, columns, c, live, numbers[0], USE_KL, REVERSE, POWER,
                TILES, STEPS, LAST_STEPS, LAST_FULL, None, soft,
            )  # fmt: skip
        loss, slopes = finish(tops, sums, known(z_label, hard, soft), factor, numbers, USE_CE, USE_KL, REVERSE)
        if smoothing is not None:
            loss -= factor * numbers[1] * smoothing * tl.where(hard, offset, 0.0)
        tl.store(loss_ptr + r, loss, mask=live)
        if GRAD:
            if TILES == 1:
                store_gradient(
                    grad_base, 0, columns, c, live, all_terms, slopes,
                    USE_CE, USE_KL, REVERSE, POWER, LAST_STEPS, LAST_FULL, flat,
                )  # fmt: skip
            else:
                sweep_gradients(
                    operands, grad_base, columns, c, live, tops, slopes, numbers[0],
                    USE_CE, USE_KL, REVERSE, POWER, TILES, STEPS, LAST_STEPS, LAST_FULL, None, soft, flat,
                )  # fmt: skip
            if USE_CE:
                e, root, u, gap = terms(z_label, t_label, tops[0], tops[1], tops[2], numbers[0], USE_KL, REVERSE, POWER)
                g = slope(e, root, u, gap, slopes, USE_CE, USE_KL, REVERSE, POWER) - factor * numbers[3]
                if smoothing is not None:
                    g += smooth - flat
                tl.debug_barrier()  # after the store of the same element by another thread
                tl.store(grad_base + label, g.to(grad_ptr.dtype.element_ty), mask=live)
