"""Triton kernel of ``kd_loss`` for teachers with all classes: losses and gradient in one launch.

The number of classes decides how rows are split into tiles:

- up to 256: a tile has several rows;
- up to 16,384: a tile is one row, read once and kept in registers for its gradient;
- more: a row is swept twice, forward for the running maxima and sums, then backward for the gradient, so that it starts
  with the tiles that are still in the cache.

Names: z and t are the logits of student and teacher; e = exp((z - max z) / T), u = exp((t - max t) / T) and
e1 = exp(z - max z) are the terms of their softmaxes, the last one at temperature 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton_common import LN2, LOG2E, exp_at_one, finite_or_zero, row_factors, row_indices

__all__ = ["dense_kernel", "tile_shape"]


@triton.jit
def accumulate(
    z,
    t,
    max_z,
    max_t,
    origin,
    sum_e1,
    sum_e,
    sum_u,
    cross,
    scale,
    temperature,
    USE_CE: tl.constexpr,
    USE_KL: tl.constexpr,
    REVERSE: tl.constexpr,
    POWER: tl.constexpr,
):
    """Add a tile of both rows to their maxima and sums.

    ``cross`` sums the first distribution of the divergence times the gap between the logarithms of both. Student logits
    are relative to their maximum, teacher logits to ``origin``: their maximum, or for the reverse divergence the logit
    of the class with the student's maximum. The gaps are then small where the first distribution is large, even if the
    logits are far apart.
    """
    new_max_z = tl.maximum(max_z, tl.max(z, 1))
    d = z - finite_or_zero(new_max_z)[:, None]
    e = tl.exp2(d * scale)
    d_max = max_z - finite_or_zero(new_max_z)
    factor_e = tl.exp2(d_max * scale)
    if USE_KL:
        new_max_t = tl.maximum(max_t, tl.max(t, 1))
        u = tl.exp2((t - finite_or_zero(new_max_t)[:, None]) * scale)
        factor_u = tl.exp2((max_t - finite_or_zero(new_max_t)) * scale)
        new_origin = new_max_t
        if REVERSE:
            t_at_max = tl.max(tl.where(z == new_max_z[:, None], t, float("-inf")), 1)
            new_origin = tl.where(new_max_z > max_z, t_at_max, origin)
        shift = (
            (finite_or_zero(new_origin) - finite_or_zero(origin)) - (finite_or_zero(new_max_z) - finite_or_zero(max_z))
        ) * scale
        gap = ((t - finite_or_zero(new_origin)[:, None]) - d) * scale
        weight = e if REVERSE else u
        factor_cross = factor_e if REVERSE else factor_u
        cross -= (sum_e if REVERSE else sum_u) * shift
        # A class of probability zero adds nothing, even if the other distribution's log-probability is infinite.
        cross = tl.where(factor_cross == 0.0, 0.0, cross * factor_cross) + tl.sum(
            tl.where(weight == 0.0, 0.0, gap * weight), 1
        )
        sum_u = sum_u * factor_u + tl.sum(u, 1)
        max_t = new_max_t
        origin = new_origin
    if USE_CE:
        factor_e1 = exp_at_one(factor_e, d_max, scale, temperature, POWER)
        sum_e1 = sum_e1 * factor_e1 + tl.sum(exp_at_one(e, d, scale, temperature, POWER), 1)
    sum_e = sum_e * factor_e + tl.sum(e, 1)
    return new_max_z, max_t, origin, sum_e1, sum_e, sum_u, cross


@triton.jit
def gradient(
    z,
    t,
    max_z,
    max_t,
    origin,
    sum_e1,
    sum_e,
    sum_u,
    cross,
    ce_slope,
    kl_slope,
    scale,
    temperature,
    USE_CE: tl.constexpr,
    USE_KL: tl.constexpr,
    REVERSE: tl.constexpr,
    POWER: tl.constexpr,
):
    """Return the gradient of a tile without the one-hot term, from what ``accumulate`` returned for the last tile."""
    d = z - finite_or_zero(max_z)[:, None]
    e = tl.exp2(d * scale)
    g = e * 0.0
    if USE_CE:
        g += exp_at_one(e, d, scale, temperature, POWER) * (ce_slope / sum_e1)[:, None]
    if USE_KL:
        p = e * (kl_slope / sum_e)[:, None]
        if REVERSE:
            gap = ((t - finite_or_zero(origin)[:, None]) - d) * scale
            g += tl.where(e == 0.0, 0.0, p * (LN2 * ((cross / sum_e)[:, None] - gap)))
        else:
            u = tl.exp2((t - finite_or_zero(max_t)[:, None]) * scale)
            g += p - u * (kl_slope / sum_u)[:, None]
    return g


@triton.jit
def dense_kernel(
    z_ptr,  # (N, C) student logits, strides z_row, z_col
    t_ptr,  # (M, C) teacher logits, strides t_row, t_col
    label_ptr,  # (N,) int64
    rows_ptr,  # (N,) int64 teacher row of each sample
    weights_ptr,  # (N,) float
    mass_ptr,  # (PARTS,) float32, terms of the divisor of a mean
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
    temperature,
    ce_factor,
    kl_factor,
    grad_scale,
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
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute losses and gradient of ROWS rows.

    SINGLE: a row is one tile. WIDE: the offset of a column may exceed 31 bits. ALIGN divides C and the row strides.
    """
    NEG: tl.constexpr = float("-inf")
    # The values do not change, but the compiler learns that it may load vectors of ALIGN elements.
    c = c // ALIGN * ALIGN
    z_row = z_row // ALIGN * ALIGN
    t_row = t_row // ALIGN * ALIGN
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = r < n
    factor = row_factors(live, r, weights_ptr, mass_ptr, HAS_WEIGHTS, HAS_MASS)
    live, bad, label, teacher_row = row_indices(
        r, live, label_ptr, rows_ptr, label_stride, rows_stride, ignore_index, c, m, USE_KL, HAS_LABELS, HAS_ROWS
    )
    factor = tl.where(bad, float("nan"), tl.where(live, factor, 0.0))
    z_base = z_ptr + r[:, None] * z_row
    t_base = t_ptr + teacher_row[:, None] * t_row
    scale = LOG2E / temperature if USE_KL else LOG2E
    columns = tl.arange(0, BLOCK)[None, :]
    if WIDE:
        columns = columns.to(tl.int64)

    max_z = tl.full((ROWS,), NEG, tl.float32)
    max_t = tl.full((ROWS,), NEG, tl.float32)
    origin = tl.full((ROWS,), NEG, tl.float32)
    sum_e1 = tl.zeros((ROWS,), tl.float32)
    sum_e = tl.zeros((ROWS,), tl.float32)
    sum_u = tl.zeros((ROWS,), tl.float32)
    cross = tl.zeros((ROWS,), tl.float32)
    z = tl.full((ROWS, BLOCK), NEG, tl.float32)
    t = tl.full((ROWS, BLOCK), NEG, tl.float32)
    tiles = tl.cdiv(c, BLOCK)
    for i in range(0, 1 if SINGLE else tiles):
        col = i * BLOCK + columns
        mask = live[:, None] & (col < c)
        z = tl.load(z_base + col * z_col, mask=mask, other=NEG, eviction_policy="evict_last").to(tl.float32)
        if USE_KL:
            t = tl.load(t_base + col * t_col, mask=mask, other=NEG, eviction_policy="evict_last").to(tl.float32)
        max_z, max_t, origin, sum_e1, sum_e, sum_u, cross = accumulate(
            z, t, max_z, max_t, origin, sum_e1, sum_e, sum_u, cross, scale, temperature, USE_CE, USE_KL, REVERSE, POWER
        )

    loss = tl.zeros((ROWS,), tl.float32)
    if USE_CE:
        z_label = tl.load(z_ptr + r * z_row + label * z_col, mask=live, other=0.0).to(tl.float32)
        loss += ce_factor * (LN2 * tl.log2(sum_e1) - (z_label - max_z))
    if USE_KL:
        # log2 of the ratio of the normalizers, relative to the same values as the gaps. Not the difference of two
        # logarithms: at a high temperature the ratio is close to 1, and their rounding errors would remain.
        ratio = tl.log2(sum_e / sum_u) + (finite_or_zero(origin) - finite_or_zero(max_t)) * scale
        kl = -cross / sum_e - ratio if REVERSE else cross / sum_u + ratio
        loss += kl_factor * (LN2 * kl)
    tl.store(loss_ptr + r, tl.where(live, loss * factor, 0.0), mask=r < n)

    if GRAD:
        ce_slope = factor * grad_scale * ce_factor if USE_CE else factor * 0.0
        kl_slope = factor * grad_scale * kl_factor / temperature if USE_KL else factor * 0.0
        for j in range(0, 1 if SINGLE else tiles):
            col = (0 if SINGLE else tiles - 1 - j) * BLOCK + columns
            mask = live[:, None] & (col < c)
            if not SINGLE:
                z = tl.load(z_base + col * z_col, mask=mask, other=NEG, eviction_policy="evict_first").to(tl.float32)
                if USE_KL:
                    t = tl.load(t_base + col * t_col, mask=mask, other=NEG, eviction_policy="evict_first")
                    t = t.to(tl.float32)
            g = gradient(
                z, t, max_z, max_t, origin, sum_e1, sum_e, sum_u, cross, ce_slope, kl_slope, scale, temperature,
                USE_CE, USE_KL, REVERSE, POWER,
            )  # fmt: skip
            if USE_CE:
                g -= tl.where(col == label[:, None], ce_slope[:, None], 0.0)
            g = tl.where(live[:, None], g, 0.0).to(grad_ptr.dtype.element_ty)
            at = grad_ptr + r[:, None] * c + col
            tl.store(at, g, mask=(r[:, None] < n) & (col < c), eviction_policy="evict_first")


def tile_shape(n: int, c: int) -> dict[str, int]:
    """Return the tile shape and the warps of ``dense_kernel`` for N rows of C classes.

    N only separates small from large batches. A thread has eight elements if possible, even if more rows would fit,
    since with more elements ptxas spills registers (sm_90). Above 8,192 classes it has sixteen, of which up to 28 bytes
    spill.
    """
    block = max(16, triton.next_power_of_2(c))
    if block > 16384:
        return {"SINGLE": 0, "ROWS": 1, "BLOCK": 4096, "num_warps": 16}
    rows = min(64, max(1, (4096 if n >= 8192 else 2048) // block))
    return {"SINGLE": 1, "ROWS": rows, "BLOCK": block, "num_warps": min(32, rows * block // 256)}
