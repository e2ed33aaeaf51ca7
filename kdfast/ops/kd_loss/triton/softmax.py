"""Maxima and sums of the softmaxes of a row of student and teacher logits.

Each thread has maxima and sums for its own columns until the end of a row.

Names: z and t are the logits of student and teacher, top_z and top_t their maxima. e = exp((z - top_z) / T),
u = exp((t - top_t) / T) and e1 = exp(z - top_z) are the terms of their softmaxes, the last one at temperature 1.
gap = (t - origin) - (z - top_z), and cross is the sum of the gaps times e for the reverse divergence, else u. origin is
top_t, or for the reverse divergence the teacher's logit of the student's top class: gaps are then small where the first
distribution is large, even if the logits are far apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton.common import LOG2E, add_four, finite_or_zero
from kdfast.ops.kd_loss.triton.tiles import NEG_INF, load_tile, per_row, per_thread, tile_scale

__all__ = [
    "LOWEST", "add_e1", "row_tops", "sweep_sums", "terms", "thread_tops", "tile_softmax", "tile_terms",
]  # fmt: skip

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def larger(z, t, other_z, other_t):
    return tl.maximum(z, other_z), tl.maximum(t, other_t)


@triton.jit
def larger_student(z, origin, t, other_z, other_origin, other_t):
    # The same for either order of the arguments, also of equal student logits: threads exchange their values, and each
    # passes its own first.
    first = tl.where(z >= other_z, origin, NEG_INF)
    second = tl.where(other_z >= z, other_origin, NEG_INF)
    return tl.maximum(z, other_z), tl.maximum(first, second), tl.maximum(t, other_t)


@triton.jit
def add_three(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


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
def tile_softmax(
    operands, columns, c, live, scale, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr,
    STEPS: tl.constexpr, FULL: tl.constexpr, hidden=None, soft=None,
):  # fmt: skip
    """Return the logits, maxima, terms and sums of rows of one tile; maxima and sums are (ROWS,)."""
    zs, ts = load_tile(operands, 0, columns, c, live, USE_KL, STEPS, FULL, "evict_first", hidden, soft)
    tops = row_tops(thread_tops(zs, ts, STEPS, USE_KL, REVERSE), USE_KL, REVERSE)
    relative_to = (per_row(tops[0]), per_row(tops[1]), per_row(tops[2]))
    all_terms = tile_terms(zs, ts, relative_to, tile_scale(scale, soft), STEPS, USE_KL, REVERSE, POWER)
    sums = row_sums(thread_sums(all_terms, STEPS, USE_KL, REVERSE, POWER), USE_KL, POWER)
    return (zs, ts), tops, all_terms, sums


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
    hidden=None, soft=None,
):  # fmt: skip
    """Add a tile to each thread's maxima and sums."""
    zs, ts = load_tile(operands, start, columns, c, live, USE_KL, STEPS, FULL, "evict_last", hidden, soft)
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
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr, hidden=None, soft=None,
):  # fmt: skip
    """Return maxima and sums of a row of several tiles, (1,)."""
    BLOCK: tl.constexpr = STEPS * columns.shape[1] * columns.shape[2]
    zero = tl.zeros((1, columns.shape[1]), tl.float32)
    tops, sums = (zero + LOWEST, zero + LOWEST, zero), (zero, zero, zero, zero)
    for i in range(0, TILES - 1):
        tops, sums = accumulate(
            operands, i * BLOCK, columns, c, live, tops, sums, scale,
            STEPS, STEPS, USE_KL, REVERSE, POWER, hidden, soft,
        )  # fmt: skip
    tops, sums = accumulate(
        operands, (TILES - 1) * BLOCK, columns, c, live, tops, sums, scale,
        LAST_STEPS, LAST_FULL, USE_KL, REVERSE, POWER, hidden, soft,
    )  # fmt: skip
    top_z, top_t, origin = row_tops(tops, USE_KL, REVERSE)
    new_tops = (top_z[:, None], top_t[:, None], origin[:, None])
    sums = rescale(sums, tops, new_tops, scale, USE_KL, REVERSE, POWER)
    return (top_z, top_t, origin), row_sums(sums, USE_KL, POWER)
