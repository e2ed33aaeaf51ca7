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

__all__ = ["LN2", "LOG2E", "dense_kernel", "finite", "raised", "row_factors", "tile_shape"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def raised(e, d, log2e_t, temperature, POWER: tl.constexpr):
    """exp(d) from e = exp(d / T): by squaring for T = 2 and 4 (POWER 1, 2), as it is for T = 1 (0), else on its own."""
    if POWER == 1:
        e = e * e
    elif POWER == 2:
        e = e * e
        e = e * e
    elif POWER == 3:
        e = tl.exp2(d * (log2e_t * temperature))
    return e


@triton.jit
def finite(m):
    """The maximum of a row without any finite logit, -inf, must not be subtracted from itself."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def row_factors(live, r, weights_ptr, mass_ptr, HAS_WEIGHTS: tl.constexpr, HAS_MASS: tl.constexpr):
    """Factor of each row's loss in the result: its weight over the mass of all counted rows."""
    factor = tl.where(live, 1.0, 0.0)
    if HAS_WEIGHTS:
        factor = tl.load(weights_ptr + r, mask=live, other=0.0).to(tl.float32)
    if HAS_MASS:
        mass = tl.load(mass_ptr)
        factor = tl.where(mass == 0.0, 0.0, factor / mass)
    return factor


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
    bad = r < 0
    label = r * 0
    if HAS_LABELS:
        label = tl.load(label_ptr + r * label_stride, mask=live, other=ignore_index)
        live = live & (label != ignore_index)
        bad = live & ((label < 0) | (label >= c))
        label = tl.minimum(tl.maximum(label, 0), c - 1)
    source = r
    if USE_KL:
        if HAS_ROWS:
            source = tl.load(rows_ptr + r * rows_stride, mask=live, other=0)
        bad = bad | (live & ((source < 0) | (source >= m)))
        source = tl.minimum(tl.maximum(source, 0), m - 1)
    factor = tl.where(bad, float("nan"), tl.where(live, factor, 0.0))
    z_base = z_ptr + r[:, None] * z_row
    t_base = t_ptr + source[:, None] * t_row
    scale = LOG2E / temperature if USE_KL else LOG2E
    columns = tl.arange(0, BLOCK)[None, :]
    if WIDE:
        columns = columns.to(tl.int64)

    max_z = tl.full((ROWS,), NEG, tl.float32)
    max_t = tl.full((ROWS,), NEG, tl.float32)
    sum_1 = tl.zeros((ROWS,), tl.float32)
    sum_z = tl.zeros((ROWS,), tl.float32)
    sum_t = tl.zeros((ROWS,), tl.float32)
    cross = tl.zeros((ROWS,), tl.float32)
    # Where the logarithms in `cross` count from: fixed by the first tile, so that a later maximum changes nothing.
    from_z = tl.zeros((ROWS,), tl.float32)
    from_t = tl.zeros((ROWS,), tl.float32)
    z = tl.full((ROWS, BLOCK), NEG, tl.float32)
    t = tl.full((ROWS, BLOCK), NEG, tl.float32)
    tiles = tl.cdiv(c, BLOCK)
    for i in range(0, 1 if SINGLE else tiles):
        col = i * BLOCK + columns
        mask = live[:, None] & (col < c)
        z = tl.load(z_base + col * z_col, mask=mask, other=NEG, eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(max_z, tl.max(z, 1))
        d = z - finite(higher)[:, None]
        e = tl.exp2(d * scale)
        shrink = tl.exp2((max_z - finite(higher)) * scale)
        sum_z = sum_z * shrink + tl.sum(e, 1)
        if USE_CE:
            gone = raised(shrink, max_z - finite(higher), scale, temperature, POWER)
            sum_1 = sum_1 * gone + tl.sum(raised(e, d, scale, temperature, POWER), 1)
        max_z = higher
        if USE_KL:
            t = tl.load(t_base + col * t_col, mask=mask, other=NEG, eviction_policy="evict_last").to(tl.float32)
            higher_t = tl.maximum(max_t, tl.max(t, 1))
            u = tl.exp2((t - finite(higher_t)[:, None]) * scale)
            shrink_t = tl.exp2((max_t - finite(higher_t)) * scale)
            sum_t = sum_t * shrink_t + tl.sum(u, 1)
            max_t = higher_t
            if i == 0:
                from_z = finite(max_z)
                from_t = finite(max_t)
            gap = ((t - from_t[:, None]) - (z - from_z[:, None])) * scale
            # A class of probability zero adds nothing, even where the other side's logarithm is infinite.
            if REVERSE:
                cross = cross * shrink + tl.sum(tl.where(e == 0.0, 0.0, -gap * e), 1)
            else:
                cross = cross * shrink_t + tl.sum(tl.where(u == 0.0, 0.0, gap * u), 1)

    loss = tl.zeros((ROWS,), tl.float32)
    ratio = tl.zeros((ROWS,), tl.float32)
    kl = tl.zeros((ROWS,), tl.float32)
    if USE_CE:
        z_label = tl.load(z_ptr + r * z_row + label * z_col, mask=live, other=0.0).to(tl.float32)
        loss += ce_factor * (LN2 * tl.log2(sum_1) - (z_label - max_z))
    if USE_KL:
        # log2 of the student's over the teacher's normaliser, both counted from from_z and from_t.
        ratio = tl.log2(sum_z) - tl.log2(sum_t) + ((max_z - from_z) - (max_t - from_t)) * scale
        kl = cross / sum_z - ratio if REVERSE else cross / sum_t + ratio
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
                    t = tl.load(t_base + col * t_col, mask=mask, other=NEG, eviction_policy="evict_first").to(
                        tl.float32
                    )
            d = z - finite(max_z)[:, None]
            e = tl.exp2(d * scale)
            g = tl.zeros((ROWS, BLOCK), tl.float32)
            if USE_CE:
                e1 = raised(e, d, scale, temperature, POWER)
                g += e1 * (hard / sum_1)[:, None] - tl.where(col == label[:, None], hard[:, None], 0.0)
            if USE_KL:
                p = e * (soft / sum_z)[:, None]
                if REVERSE:
                    bend = ((z - from_z[:, None]) - (t - from_t[:, None])) * scale - (ratio + kl)[:, None]
                    g += tl.where(e == 0.0, 0.0, p * (LN2 * bend))
                else:
                    u = tl.exp2((t - finite(max_t)[:, None]) * scale)
                    g += p - u * (soft / sum_t)[:, None]
            g = tl.where(live[:, None], g, 0.0).to(grad_ptr.dtype.element_ty)
            tl.store(
                grad_ptr + r[:, None] * c + col, g, mask=(r[:, None] < n) & (col < c), eviction_policy="evict_first"
            )


def tile_shape(n: int, c: int) -> dict[str, int]:
    """Tile of ``dense_kernel`` for N rows of C classes, and warps for it; N only separates small from large batches.

    Eight elements a thread where possible: ptxas then keeps everything in registers, with more it spills (sm_90).
    """
    block = max(16, triton.next_power_of_2(c))
    if block > 16384:
        return {"SINGLE": 0, "ROWS": 1, "BLOCK": 4096, "num_warps": 16}
    rows = min(64, max(1, (4096 if n >= 8192 else 2048) // block))
    return {"SINGLE": 1, "ROWS": rows, "BLOCK": block, "num_warps": min(32, rows * block // 256)}
