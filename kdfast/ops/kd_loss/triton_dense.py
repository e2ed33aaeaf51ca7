"""Triton kernel of ``kd_loss`` for teachers with all classes: losses and gradient in one launch.

A thread reads STEPS vectors of VECTOR neighboring columns from each tile, LANES threads share a row, and a program has
ROWS rows. The number of classes decides how many, see ``tile_shape``:

- A short row is one tile, which is read once and kept in registers for the gradient.
- A long row is swept twice: forward for the maxima and sums, which each thread has for its own columns until the end,
  and backward for the gradient, so that it starts with the tiles that are still in the cache.

The number of instructions limits the kernel, so that only the last vectors of a row are masked, and the one-hot term of
the gradient is left to one store per row.

Names: z and t are the logits of student and teacher, top_z and top_t their maxima. e = exp((z - top_z) / T),
u = exp((t - top_t) / T) and e1 = exp(z - top_z) are the terms of their softmaxes, the last one at temperature 1.
gap = (t - origin) - (z - top_z), and cross is the sum of the gaps times e for the reverse divergence, else u. origin is
top_t, or for the reverse divergence the teacher's logit of the student's top class: gaps are then small where the first
distribution is large, even if the logits are far apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton_common import LN2, LOG2E, finite_or_zero, row_factors, row_indices

__all__ = ["dense_kernel", "tile_shape"]

NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def larger(z, t, other_z, other_t):
    return tl.maximum(z, other_z), tl.maximum(t, other_t)


@triton.jit
def larger_student(z, origin, t, other_z, other_origin, other_t):
    is_other = other_z > z
    return tl.where(is_other, other_z, z), tl.where(is_other, other_origin, origin), tl.maximum(t, other_t)


@triton.jit
def add_three(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def add_four(a, b, c, d, other_a, other_b, other_c, other_d):
    return a + other_a, b + other_b, c + other_c, d + other_d


@triton.jit
def per_row(x):
    """Broadcast (ROWS,) over the columns of a tile."""
    return x[:, None, None]


@triton.jit
def per_thread(x):
    """Broadcast (ROWS, LANES) over the columns of each thread."""
    return x[:, :, None]


@triton.jit
def inside(col, c, rows):
    """Return which columns exist, in the rows (ROWS,); the condition holds if there is one row."""
    mask = col < c
    if rows.shape[0] > 1:
        mask = mask & per_row(rows)
    return mask


@triton.jit
def load_steps(base, start, columns, stride, c, live, STEPS: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr):
    """Load the vectors of a tile, each (ROWS, LANES, VECTOR); the first FULL are not masked."""
    vectors = ()
    for k in tl.static_range(STEPS):
        col = start + k * columns.shape[1] * columns.shape[2] + columns
        if k < FULL:
            x = tl.load(base + col * stride, eviction_policy=POLICY)
        else:
            x = tl.load(base + col * stride, mask=inside(col, c, live), other=NEG_INF, eviction_policy=POLICY)
        vectors = vectors + (x,)  # type: ignore[assignment]  # noqa: RUF005
    return vectors


@triton.jit
def load_tile(
    operands, start, columns, c, live,
    USE_KL: tl.constexpr, STEPS: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Load the vectors of student and teacher; ``operands`` are their row pointers and column strides."""
    z_base, z_col, t_base, t_col = operands
    zs = load_steps(per_row(z_base), start, columns, z_col, c, live, STEPS, FULL, POLICY)
    ts = zs
    if USE_KL:
        ts = load_steps(per_row(t_base), start, columns, t_col, c, live, STEPS, FULL, POLICY)
    return zs, ts


@triton.jit
def finite(top):
    """Return a maximum that is not -inf, from which -inf must not be subtracted."""
    return tl.maximum(top, LOWEST)


@triton.jit
def thread_tops(zs, ts, STEPS: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr):
    """Return top_z, top_t and origin of each thread's columns, (ROWS, LANES)."""
    z, t = zs[0], ts[0]  # not converted, since a maximum of float16 takes two elements per instruction
    t_at_top = t
    if REVERSE:
        z = z.to(tl.float32)
    for k in tl.static_range(1, STEPS):
        if REVERSE:
            t_at_top = tl.where(zs[k].to(tl.float32) > z, ts[k], t_at_top)
        z = tl.maximum(z, zs[k])
        if USE_KL:
            t = tl.maximum(t, ts[k])
    z = z.to(tl.float32)
    top = tl.max(z, 2)
    top_z = finite(top)
    top_t = top_z
    if USE_KL:
        top_t = finite(tl.max(t.to(tl.float32), 2))
    origin = top_t
    if REVERSE:
        origin = finite_or_zero(tl.max(tl.where(z == per_thread(top), t_at_top.to(tl.float32), NEG_INF), 2))
    return top_z, top_t, origin


@triton.jit
def row_tops(tops, USE_KL: tl.constexpr, REVERSE: tl.constexpr):
    """Combine what ``thread_tops`` returned for the threads of a row, (ROWS,)."""
    top_z, top_t, origin = tops
    if REVERSE:
        top_z, origin, top_t = tl.reduce((top_z, origin, top_t), 1, larger_student)
    elif USE_KL:
        top_z, top_t = tl.reduce((top_z, top_t), 1, larger)
        origin = top_t
    else:
        top_z = tl.max(top_z, 1)
        top_t, origin = top_z, top_z
    return top_z, top_t, origin


@triton.jit
def terms(z, t, top_z, top_t, origin, scale, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr):
    """Return e, a root of e1 (see ``add_e1``), u and gap."""
    d = z - top_z
    e = tl.exp2(d * scale)
    root = e
    if POWER == 2:
        root = e * e
    elif POWER == 3:
        root = tl.exp2(d * LOG2E)
    u, gap = e, e
    if USE_KL:
        u = tl.exp2((t - top_t) * scale)
        gap = (t - origin) - d
        if REVERSE:
            # A class of probability zero adds nothing, even if the teacher's log-probability is infinite.
            gap = tl.where(e == 0.0, 0.0, gap)
    return e, root, u, gap


@triton.jit
def tile_terms(
    zs, ts, tops, scale,
    STEPS: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Return the ``terms`` of all vectors: four tuples."""
    top_z, top_t, origin = tops
    es, roots, us, gaps = (), (), (), ()
    for k in tl.static_range(STEPS):
        z, t = zs[k].to(tl.float32), ts[k].to(tl.float32)
        e, root, u, gap = terms(z, t, top_z, top_t, origin, scale, USE_KL, REVERSE, POWER)
        es, roots, us, gaps = es + (e,), roots + (root,), us + (u,), gaps + (gap,)  # type: ignore[assignment]  # noqa: RUF005
    return es, roots, us, gaps


@triton.jit
def add_e1(root, factor, total, POWER: tl.constexpr):
    """Return total + factor * e1, where e1 is the square of ``root`` for T = 2 and 4, and ``root`` for any other T."""
    return tl.fma(root * factor if POWER == 1 or POWER == 2 else factor, root, total)


@triton.jit
def thread_sums(all_terms, STEPS: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr):
    """Return the sums of e1, e and u, and cross, of each thread's columns, (ROWS, LANES)."""
    es, roots, us, gaps = all_terms
    sum_e, sum_u = es[0], us[0]
    sum_e1 = roots[0] * roots[0] if POWER == 1 or POWER == 2 else roots[0]
    cross = gaps[0] * es[0] if REVERSE else tl.where(us[0] == 0.0, 0.0, gaps[0] * us[0])
    for k in tl.static_range(1, STEPS):
        sum_e += es[k]
        sum_e1 = add_e1(roots[k], 1.0, sum_e1, POWER)
        sum_u += us[k]
        if REVERSE:
            cross = tl.fma(gaps[k], es[k], cross)
        else:
            # As in `terms`; a condition on the sum is cheaper than one on the gap.
            cross = tl.where(us[k] == 0.0, cross, tl.fma(gaps[k], us[k], cross))
    sum_e = tl.sum(sum_e, 2)
    sum_e1 = sum_e if POWER == 0 else tl.sum(sum_e1, 2)
    sum_u = tl.sum(sum_u, 2) if USE_KL else sum_e
    cross = tl.sum(cross, 2) if USE_KL else sum_e
    return sum_e1, sum_e, sum_u, cross


@triton.jit
def row_sums(sums, USE_KL: tl.constexpr, POWER: tl.constexpr):
    """Combine what ``thread_sums`` returned for the threads of a row, (ROWS,)."""
    sum_e1, sum_e, sum_u, cross = sums
    if USE_KL and POWER != 0:
        sum_e1, sum_e, sum_u, cross = tl.reduce((sum_e1, sum_e, sum_u, cross), 1, add_four)
    elif USE_KL:
        sum_e, sum_u, cross = tl.reduce((sum_e, sum_u, cross), 1, add_three)
        sum_e1 = sum_e
    else:
        sum_e = tl.sum(sum_e, 1)
        sum_e1, sum_u, cross = sum_e, sum_e, sum_e
    return sum_e1, sum_e, sum_u, cross


@triton.jit
def rescale(
    sums, tops, new_tops, scale, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr
):  # fmt: skip
    """Return sums relative to other maxima."""
    sum_e1, sum_e, sum_u, cross = sums
    d = tops[0] - new_tops[0]
    factor_e = tl.exp2(d * scale)
    if POWER == 3:
        sum_e1 *= tl.exp2(d * LOG2E)
    elif POWER != 0:
        root = factor_e * factor_e if POWER == 2 else factor_e
        sum_e1 *= root * root
    if USE_KL:
        factor_u = tl.exp2((tops[1] - new_tops[1]) * scale)
        factor = factor_e if REVERSE else factor_u
        moved = (new_tops[2] - tops[2]) + d
        cross = tl.fma(sum_e if REVERSE else sum_u, -moved, cross)
        cross = tl.where(factor == 0.0, 0.0, cross * factor)
        sum_u *= factor_u
    sum_e *= factor_e
    if POWER == 0:
        sum_e1 = sum_e
    return sum_e1, sum_e, sum_u, cross


@triton.jit
def accumulate(
    operands, start, columns, c, live, tops, sums, scale,
    STEPS: tl.constexpr, FULL: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Add a tile to each thread's maxima and sums."""
    zs, ts = load_tile(operands, start, columns, c, live, USE_KL, STEPS, FULL, "evict_last")
    z, t, t_at_top = thread_tops(zs, ts, STEPS, USE_KL, REVERSE)
    top_z, top_t = tl.maximum(tops[0], z), tl.maximum(tops[1], t)
    origin = tl.where(z > tops[0], t_at_top, tops[2]) if REVERSE else top_t
    relative_to = (per_thread(top_z), per_thread(top_t), per_thread(origin))
    all_terms = tile_terms(zs, ts, relative_to, scale, STEPS, USE_KL, REVERSE, POWER)
    e1, e, u, x = thread_sums(all_terms, STEPS, USE_KL, REVERSE, POWER)
    new_tops = (top_z, top_t, origin)
    sum_e1, sum_e, sum_u, cross = rescale(sums, tops, new_tops, scale, USE_KL, REVERSE, POWER)
    return new_tops, (sum_e1 + e1, sum_e + e, sum_u + u, cross + x)


@triton.jit
def sweep_sums(
    operands, columns, c, live, scale, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr,
):  # fmt: skip
    """Return maxima and sums of a row of several tiles, (1,)."""
    BLOCK: tl.constexpr = STEPS * columns.shape[1] * columns.shape[2]
    zero = tl.zeros((1, columns.shape[1]), tl.float32)
    tops, sums = (zero + LOWEST, zero + LOWEST, zero), (zero, zero, zero, zero)
    for i in range(0, TILES - 1):
        tops, sums = accumulate(
            operands, i * BLOCK, columns, c, live, tops, sums, scale,
            STEPS, STEPS, USE_KL, REVERSE, POWER,
        )  # fmt: skip
    tops, sums = accumulate(
        operands, (TILES - 1) * BLOCK, columns, c, live, tops, sums, scale,
        LAST_STEPS, LAST_FULL, USE_KL, REVERSE, POWER,
    )  # fmt: skip
    top_z, top_t, origin = row_tops(tops, USE_KL, REVERSE)
    new_tops = (top_z[:, None], top_t[:, None], origin[:, None])
    sums = rescale(sums, tops, new_tops, scale, USE_KL, REVERSE, POWER)
    return (top_z, top_t, origin), row_sums(sums, USE_KL, POWER)


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
def slope(
    e, root, u, gap, slopes, USE_CE: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr
):  # fmt: skip
    """Return the gradient without the one-hot term."""
    hard, soft, other = slopes
    if REVERSE:
        g = e * tl.fma(gap, -other, soft)
    elif USE_KL:
        g = tl.fma(u, -other, e * soft)
    else:
        g = e * hard
    if USE_KL and USE_CE:
        g = add_e1(root, hard, g, POWER)
    return g


@triton.jit
def store_gradient(
    base, start, columns, c, exists, all_terms, slopes,
    USE_CE: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr,
    STEPS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    es, roots, us, gaps = all_terms
    coefficients = (per_row(slopes[0]), per_row(slopes[1]), per_row(slopes[2]))
    for k in tl.static_range(STEPS):
        g = slope(es[k], roots[k], us[k], gaps[k], coefficients, USE_CE, USE_KL, REVERSE, POWER)
        col = start + k * columns.shape[1] * columns.shape[2] + columns
        g = g.to(base.dtype.element_ty)
        if k < FULL:
            tl.store(per_row(base) + col, g, eviction_policy="evict_first")
        else:
            tl.store(per_row(base) + col, g, mask=inside(col, c, exists), eviction_policy="evict_first")


@triton.jit
def sweep_gradient(
    operands, base, start, columns, c, live, tops, slopes, scale,
    USE_CE: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr,
    STEPS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Read a tile again and store its gradient."""
    zs, ts = load_tile(operands, start, columns, c, live, USE_KL, STEPS, FULL, "evict_first")
    relative_to = (per_row(tops[0]), per_row(tops[1]), per_row(tops[2]))
    all_terms = tile_terms(zs, ts, relative_to, scale, STEPS, USE_KL, REVERSE, POWER)
    store_gradient(base, start, columns, c, live, all_terms, slopes, USE_CE, USE_KL, REVERSE, POWER, STEPS, FULL)


@triton.jit
def store_zeros(base, columns, c, exists, STEPS: tl.constexpr):
    zero = tl.zeros((base.shape[0], columns.shape[1], columns.shape[2]), base.dtype.element_ty)
    for k in range(0, STEPS):
        col = k * columns.shape[1] * columns.shape[2] + columns
        tl.store(per_row(base) + col, zero, mask=inside(col, c, exists), eviction_policy="evict_first")


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
):
    """Compute losses and gradient of ROWS rows.

    WIDE: the offset of a column may exceed 31 bits. ALIGN divides C and the row strides. LAST_STEPS is the number of
    vectors of the last of TILES tiles, of which LAST_FULL need no mask. POWER is as for ``exp_at_one``.
    """
    # The values do not change, but the compiler learns that it may load vectors of ALIGN elements.
    c = c // ALIGN * ALIGN
    z_row = z_row // ALIGN * ALIGN
    t_row = t_row // ALIGN * ALIGN
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = r < n
    live, bad, label, teacher_row = row_indices(
        r, exists, label_ptr, rows_ptr, label_stride, rows_stride, ignore_index, c, m, USE_KL, HAS_LABELS, HAS_ROWS
    )
    columns = tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    if WIDE:
        columns = columns.to(tl.int64)
    grad_base = grad_ptr + r * c
    if tl.max(live.to(tl.int32), 0) == 0:
        tl.store(loss_ptr + r, tl.zeros((ROWS,), tl.float32), mask=exists)
        if GRAD:
            store_zeros(grad_base, columns, c, exists, (TILES - 1) * STEPS + LAST_STEPS)
    else:
        factor = row_factors(live, r, weights_ptr, mass_ptr, HAS_WEIGHTS, HAS_MASS)
        factor = tl.where(bad, float("nan"), factor)
        operands = (z_ptr + r * z_row, z_col, t_ptr + teacher_row * t_row, t_col)
        z_label, t_label = factor, factor
        if USE_CE:
            z_label = tl.load(operands[0] + label * z_col, mask=live, other=0.0).to(tl.float32)
            if USE_KL and GRAD:
                t_label = tl.load(operands[2] + label * t_col, mask=live, other=0.0).to(tl.float32)
        if TILES == 1:
            zs, ts = load_tile(
                operands, 0, columns, c, live, USE_KL, LAST_STEPS, LAST_FULL, "evict_first"
            )  # fmt: skip
            tops = row_tops(thread_tops(zs, ts, LAST_STEPS, USE_KL, REVERSE), USE_KL, REVERSE)
            relative_to = (per_row(tops[0]), per_row(tops[1]), per_row(tops[2]))
            all_terms = tile_terms(zs, ts, relative_to, scale, LAST_STEPS, USE_KL, REVERSE, POWER)
            sums = row_sums(thread_sums(all_terms, LAST_STEPS, USE_KL, REVERSE, POWER), USE_KL, POWER)
        else:
            tops, sums = sweep_sums(
                operands, columns, c, live, scale, USE_KL, REVERSE, POWER,
                TILES, STEPS, LAST_STEPS, LAST_FULL,
            )  # fmt: skip
        numbers = (scale, ce_factor, kl_factor, ce_slope, kl_slope)
        loss, slopes = finish(tops, sums, z_label, factor, numbers, USE_CE, USE_KL, REVERSE)
        tl.store(loss_ptr + r, tl.where(live, loss, 0.0), mask=exists)
        if GRAD:
            if TILES == 1:
                slopes = (
                    tl.where(live, slopes[0], 0.0), tl.where(live, slopes[1], 0.0), tl.where(live, slopes[2], 0.0),
                )  # fmt: skip
                store_gradient(
                    grad_base, 0, columns, c, exists, all_terms, slopes,
                    USE_CE, USE_KL, REVERSE, POWER, LAST_STEPS, LAST_FULL,
                )  # fmt: skip
            else:
                BLOCK: tl.constexpr = STEPS * LANES * VECTOR
                sweep_gradient(
                    operands, grad_base, (TILES - 1) * BLOCK, columns, c, live, tops, slopes, scale,
                    USE_CE, USE_KL, REVERSE, POWER, LAST_STEPS, LAST_FULL,
                )  # fmt: skip
                for j in range(0, TILES - 1):
                    sweep_gradient(
                        operands, grad_base, (TILES - 2 - j) * BLOCK, columns, c, live, tops, slopes, scale,
                        USE_CE, USE_KL, REVERSE, POWER, STEPS, STEPS,
                    )  # fmt: skip
            if USE_CE:
                e, root, u, gap = terms(z_label, t_label, tops[0], tops[1], tops[2], scale, USE_KL, REVERSE, POWER)
                g = slope(e, root, u, gap, slopes, USE_CE, USE_KL, REVERSE, POWER) - factor * ce_slope
                tl.debug_barrier()  # after the store of the same element by another thread
                tl.store(grad_base + label, g.to(grad_ptr.dtype.element_ty), mask=live)


def tile_shape(classes: int, vector: int, reverse: bool) -> dict[str, int]:
    """Return the tiles and the warps of ``dense_kernel``, for vectors of ``vector`` elements.

    A thread has up to 32 elements of a tile: with more, ptxas spills registers (sm_90); with fewer, the instructions
    for a row weigh more. The longer a row of several tiles, the more warps it has, of 95 to 128 registers a thread.
    Rows that 132 multiprocessors process at a time are then at most 44 MB of half-precision logits up to 65,536
    classes, so that a cache of 50 MB still has them when they are read again.
    """
    power = triton.next_power_of_2(classes)
    single = power <= (4096 if reverse else 8192)
    rows = warps = 1
    if power <= 512:
        # The threads of a row read at least eight neighboring elements at a time.
        lanes = max(power // 32, min(8 // vector, triton.next_power_of_2(triton.cdiv(classes, 8))))
        rows = 32 // lanes
    else:
        warps = max(1, power // 1024) if single else min(16, max(4, power // 4096))
        lanes = 32 * warps
    width = lanes * vector
    steps = 32 // vector
    tiles = 1 if single else triton.cdiv(classes, steps * width)
    last = classes - (tiles - 1) * steps * width
    shape = {
        "ROWS": rows, "LANES": lanes, "VECTOR": vector, "STEPS": steps, "TILES": tiles,
        "LAST_STEPS": triton.cdiv(last, width), "LAST_FULL": last // width if rows == 1 else 0, "num_warps": warps,
    }  # fmt: skip
    return {**shape, "maxnreg": 128} if warps == 8 and not single else shape
