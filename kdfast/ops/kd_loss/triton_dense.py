"""Triton kernel of ``kd_loss`` for teachers with all classes: losses and gradient in one launch, over tiles.

Three shapes of work:

- up to 256 classes: many rows a program, so that a tile fills it;
- up to 16,384 classes: a row is one tile, read once and kept in registers for its gradient;
- more: a row is swept twice, first for the running maxima and sums, then from its end back, where the last tiles are
  still in the cache, for the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton_common import LN2, LOG2E, finite, picked_rows, raised, row_factors

__all__ = ["dense_kernel", "tile_shape"]


@triton.jit
def advance(
    z,
    t,
    max_z,
    max_t,
    base,
    sum_1,
    sum_z,
    sum_t,
    cross,
    scale,
    temperature,
    USE_CE: tl.constexpr,
    USE_KL: tl.constexpr,
    REVERSE: tl.constexpr,
    POWER: tl.constexpr,
):
    """Take a tile of both rows into their maxima and sums.

    ``cross`` sums p (the divergence's first distribution) times the gap of log q and log p. The student's logarithms
    count from its maximum, the teacher's from ``base``: its maximum, or for the reverse divergence its logit of the
    class where the student's maximum is. So gaps are small where p is large, however far the logits spread.
    """
    top_z = tl.maximum(max_z, tl.max(z, 1))
    d = z - finite(top_z)[:, None]
    e = tl.exp2(d * scale)
    lost = max_z - finite(top_z)
    shrink = tl.exp2(lost * scale)
    if USE_KL:
        top_t = tl.maximum(max_t, tl.max(t, 1))
        u = tl.exp2((t - finite(top_t)[:, None]) * scale)
        shrink_t = tl.exp2((max_t - finite(top_t)) * scale)
        to = top_t
        if REVERSE:
            there = tl.max(tl.where(z == top_z[:, None], t, float("-inf")), 1)
            to = tl.where(top_z > max_z, there, base)
        moved = ((finite(to) - finite(base)) - (finite(top_z) - finite(max_z))) * scale
        gap = ((t - finite(to)[:, None]) - d) * scale
        weight = e if REVERSE else u
        smaller = shrink if REVERSE else shrink_t
        cross -= (sum_z if REVERSE else sum_t) * moved
        # A class of probability zero adds nothing, even where the other side's logarithm is infinite.
        cross = tl.where(smaller == 0.0, 0.0, cross * smaller) + tl.sum(tl.where(weight == 0.0, 0.0, gap * weight), 1)
        sum_t = sum_t * shrink_t + tl.sum(u, 1)
        max_t = top_t
        base = to
    if USE_CE:
        gone = raised(shrink, lost, scale, temperature, POWER)
        sum_1 = sum_1 * gone + tl.sum(raised(e, d, scale, temperature, POWER), 1)
    sum_z = sum_z * shrink + tl.sum(e, 1)
    return top_z, max_t, base, sum_1, sum_z, sum_t, cross


@triton.jit
def slope(
    z,
    t,
    max_z,
    max_t,
    base,
    sum_1,
    sum_z,
    sum_t,
    cross,
    hard,
    soft,
    scale,
    temperature,
    USE_CE: tl.constexpr,
    USE_KL: tl.constexpr,
    REVERSE: tl.constexpr,
    POWER: tl.constexpr,
):
    """Gradient of a tile, but for the label's element; arguments as ``advance`` left them at the end of the row."""
    d = z - finite(max_z)[:, None]
    e = tl.exp2(d * scale)
    g = e * 0.0
    if USE_CE:
        g += raised(e, d, scale, temperature, POWER) * (hard / sum_1)[:, None]
    if USE_KL:
        p = e * (soft / sum_z)[:, None]
        if REVERSE:
            gap = ((t - finite(base)[:, None]) - d) * scale
            g += tl.where(e == 0.0, 0.0, p * (LN2 * ((cross / sum_z)[:, None] - gap)))
        else:
            u = tl.exp2((t - finite(max_t)[:, None]) * scale)
            g += p - u * (soft / sum_t)[:, None]
    return g


@triton.jit
def dense_kernel(
    z_ptr,  # (N, C) student logits, strides z_row, z_col
    t_ptr,  # (M, C) teacher logits, strides t_row, t_col
    label_ptr,  # (N,) int64
    rows_ptr,  # (N,) int64 rows of the teacher
    weights_ptr,  # (N,) float
    mass_ptr,  # () float32, what a mean divides by
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
    hold,
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
    """Losses and gradient of ROWS rows. SINGLE: a row is one tile; WIDE: a column's offset may exceed 31 bits.

    ALIGN divides C and the row strides.
    """
    NEG: tl.constexpr = float("-inf")
    # No change of value: it tells the compiler that whole vectors of ALIGN elements may be loaded.
    c = c // ALIGN * ALIGN
    z_row = z_row // ALIGN * ALIGN
    t_row = t_row // ALIGN * ALIGN
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = r < n
    factor = row_factors(live, r, weights_ptr, mass_ptr, HAS_WEIGHTS, HAS_MASS)
    live, bad, label, source = picked_rows(
        r, live, label_ptr, rows_ptr, label_stride, rows_stride, ignore_index, c, m, USE_KL, HAS_LABELS, HAS_ROWS
    )
    factor = tl.where(bad, float("nan"), tl.where(live, factor, 0.0))
    z_base = z_ptr + r[:, None] * z_row
    t_base = t_ptr + source[:, None] * t_row
    scale = LOG2E / temperature if USE_KL else LOG2E
    columns = tl.arange(0, BLOCK)[None, :]
    if WIDE:
        columns = columns.to(tl.int64)

    max_z = tl.full((ROWS,), NEG, tl.float32)
    max_t = tl.full((ROWS,), NEG, tl.float32)
    base = tl.full((ROWS,), NEG, tl.float32)
    sum_1 = tl.zeros((ROWS,), tl.float32)
    sum_z = tl.zeros((ROWS,), tl.float32)
    sum_t = tl.zeros((ROWS,), tl.float32)
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
        max_z, max_t, base, sum_1, sum_z, sum_t, cross = advance(
            z, t, max_z, max_t, base, sum_1, sum_z, sum_t, cross, scale, temperature, USE_CE, USE_KL, REVERSE, POWER
        )

    loss = tl.zeros((ROWS,), tl.float32)
    if USE_CE:
        z_label = tl.load(z_ptr + r * z_row + label * z_col, mask=live, other=0.0).to(tl.float32)
        loss += ce_factor * (LN2 * tl.log2(sum_1) - (z_label - max_z))
    if USE_KL:
        # log2 of the student's over the teacher's normaliser, counted as the gaps are. Of their quotient: at a high
        # temperature it is near one, and two logarithms would leave their own rounding.
        ratio = tl.log2(sum_z / sum_t) + (finite(base) - finite(max_t)) * scale
        kl = -cross / sum_z - ratio if REVERSE else cross / sum_t + ratio
        loss += kl_factor * (LN2 * kl)
    tl.store(loss_ptr + r, tl.where(live, loss * factor, 0.0), mask=r < n)

    if GRAD:
        hard = factor * hold * ce_factor if USE_CE else factor * 0.0
        soft = factor * hold * kl_factor / temperature if USE_KL else factor * 0.0
        for j in range(0, 1 if SINGLE else tiles):
            col = (0 if SINGLE else tiles - 1 - j) * BLOCK + columns
            mask = live[:, None] & (col < c)
            if not SINGLE:
                z = tl.load(z_base + col * z_col, mask=mask, other=NEG, eviction_policy="evict_first").to(tl.float32)
                if USE_KL:
                    t = tl.load(t_base + col * t_col, mask=mask, other=NEG, eviction_policy="evict_first")
                    t = t.to(tl.float32)
            g = slope(
                z, t, max_z, max_t, base, sum_1, sum_z, sum_t, cross, hard, soft, scale, temperature,
                USE_CE, USE_KL, REVERSE, POWER,
            )  # fmt: skip
            if USE_CE:
                g -= tl.where(col == label[:, None], hard[:, None], 0.0)
            g = tl.where(live[:, None], g, 0.0).to(grad_ptr.dtype.element_ty)
            at = grad_ptr + r[:, None] * c + col
            tl.store(at, g, mask=(r[:, None] < n) & (col < c), eviction_policy="evict_first")


def tile_shape(n: int, c: int) -> dict[str, int]:
    """Tile of ``dense_kernel`` for N rows of C classes, and warps for it; N only separates small from large batches.

    Eight elements a thread where possible, though that be fewer rows than would fit: with more, ptxas spills (sm_90).
    Above 8,192 classes a tile has sixteen, and up to 28 bytes a thread spill.
    """
    block = max(16, triton.next_power_of_2(c))
    if block > 16384:
        return {"SINGLE": 0, "ROWS": 1, "BLOCK": 4096, "num_warps": 16}
    rows = min(64, max(1, (4096 if n >= 8192 else 2048) // block))
    return {"SINGLE": 1, "ROWS": rows, "BLOCK": block, "num_warps": min(32, rows * block // 256)}
