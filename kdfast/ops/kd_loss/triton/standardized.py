"""Rows of the divergence of standardized logits: each row of student and teacher has a temperature of its own.

The deviation of a row is computed in two passes relative to its largest logit, or by Chan's rule for combining parts if
the row has several tiles. A common offset of the logits then does not cancel. A row of several tiles is swept three
times: for maxima and deviations, for the sums, and for the gradient.

d = z - top_z; b = d times the scale of the student's row and a = (t - top_t) times that of the teacher's are the binary
logarithms of e and u.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton.common import LN2, LOG2E, add_four, add_two, known
from kdfast.ops.kd_loss.triton.softmax import LOWEST, row_tops, thread_tops
from kdfast.ops.kd_loss.triton.tiles import NEG_INF, at_label, load_steps, load_tile, per_row, per_thread, store_vector

__all__ = ["standardized"]

EPSILON = tl.constexpr(1e-7)  # STANDARDIZATION_EPSILON of reference.py


@triton.jit
def add_six(a, b, c, d, e, f, other_a, other_b, other_c, other_d, other_e, other_f):
    return a + other_a, b + other_b, c + other_c, d + other_d, e + other_e, f + other_f


@triton.jit
def kept(d, x):
    """Return x where a class is not masked, else 0; d is its logit relative to any finite number."""
    return tl.where(d > NEG_INF, x, 0.0)


@triton.jit
def thread_totals(xs, top, STEPS: tl.constexpr):
    """Return the number of classes that are not masked and the sum of x - top over them, (ROWS, LANES)."""
    d = xs[0].to(tl.float32) - top
    count, total = kept(d, 1.0), kept(d, d)
    for k in tl.static_range(1, STEPS):
        d = xs[k].to(tl.float32) - top
        # A condition on the sum is cheaper than one on the summand.
        count = tl.where(d > NEG_INF, count + 1.0, count)
        total = tl.where(d > NEG_INF, total + d, total)
    return tl.sum(count, 2), tl.sum(total, 2)


@triton.jit
def thread_squares(xs, top, mean, STEPS: tl.constexpr):
    """Return the sum of the squared distances from the mean, (ROWS, LANES)."""
    d = xs[0].to(tl.float32) - top
    centered = kept(d, d - mean)
    squares = centered * centered
    for k in tl.static_range(1, STEPS):
        d = xs[k].to(tl.float32) - top
        squares = tl.where(d > NEG_INF, tl.fma(d - mean, d - mean, squares), squares)
    return tl.sum(squares, 2)


@triton.jit
def tile_spreads(zs, ts, tops, STEPS: tl.constexpr):
    """Return count, mean and squares of student and teacher in rows of one tile, (ROWS,)."""
    top_z, top_t = per_row(tops[0]), per_row(tops[1])
    count_z, total_z = thread_totals(zs, top_z, STEPS)
    count_t, total_t = thread_totals(ts, top_t, STEPS)
    count_z, total_z, count_t, total_t = tl.reduce((count_z, total_z, count_t, total_t), 1, add_four)
    mean_z, mean_t = total_z / count_z, total_t / count_t
    squares_z = thread_squares(zs, top_z, per_row(mean_z), STEPS)
    squares_t = thread_squares(ts, top_t, per_row(mean_t), STEPS)
    squares_z, squares_t = tl.reduce((squares_z, squares_t), 1, add_two)
    return (count_z, mean_z, squares_z), (count_t, mean_t, squares_t)


@triton.jit
def add_spread(
    base, start, columns, stride, c, live, top, spread, STEPS: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Add a tile to each thread's maximum, and to its count, mean relative to the maximum, and squares."""
    xs = load_steps(per_row(base), start, columns, stride, c, live, STEPS, FULL, "evict_last")
    largest, _, _ = thread_tops(xs, xs, STEPS, False, False)
    new_top = tl.maximum(top, largest)
    count, mean, squares = spread
    more, total = thread_totals(xs, per_thread(new_top), STEPS)
    mean_of_tile = total / tl.maximum(more, 1.0)
    squares += thread_squares(xs, per_thread(new_top), per_thread(mean_of_tile), STEPS)
    mean = tl.where(count == 0.0, mean_of_tile, mean + (top - new_top))
    share = more / tl.maximum(count + more, 1.0)
    d = mean_of_tile - mean
    return new_top, (count + more, tl.fma(d, share, mean), tl.fma(d * d, count * share, squares))


@triton.jit
def row_spread(spread, top, row_top):
    """Combine the spreads of the threads of a row, (1,)."""
    count, mean, squares = spread
    mean = tl.where(count == 0.0, 0.0, mean + (top - row_top[:, None]))
    row_count, total = tl.reduce((count, count * mean), 1, add_two)
    row_mean = total / row_count
    d = mean - row_mean[:, None]
    return row_count, row_mean, tl.sum(tl.fma(count * d, d, squares), 1)


@triton.jit
def sweep_spread(
    base, stride, columns, c, live,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr,
):  # fmt: skip
    """Return maximum and spread of a row of several tiles, (1,).

    One network at a time, since both would need too many registers.
    """
    BLOCK: tl.constexpr = STEPS * columns.shape[1] * columns.shape[2]
    zero = tl.zeros((1, columns.shape[1]), tl.float32)
    top, spread = zero + LOWEST, (zero, zero, zero)
    for i in range(0, TILES - 1):
        top, spread = add_spread(base, i * BLOCK, columns, stride, c, live, top, spread, STEPS, STEPS)
    top, spread = add_spread(
        base, (TILES - 1) * BLOCK, columns, stride, c, live, top, spread, LAST_STEPS, LAST_FULL
    )  # fmt: skip
    row_top = tl.max(top, 1)
    return row_top, row_spread(spread, top, row_top)


@triton.jit
def own_teacher(soft, tops, student, teacher):
    """Return the maxima and the teacher's spread, which are the student's in rows without a divergence."""
    count, mean, squares = teacher
    count, mean = tl.where(soft, count, student[0]), tl.where(soft, mean, student[1])
    return (tops[0], tl.where(soft, tops[1], tops[0])), (count, mean, tl.where(soft, squares, student[2]))


@triton.jit
def deviation(spread):
    """Return the standard deviation of each row, 0 for a single class."""
    return tl.sqrt(spread[2] / tl.maximum(spread[0] - 1.0, 1.0))


@triton.jit
def terms(z, t, tops, scales, mean, USE_CE: tl.constexpr):
    """Return e1, e, u, z - mean and a - b; what is not finite for a masked class is 0."""
    d = z - tops[0]
    b, a = d * scales[0], (t - tops[1]) * scales[1]
    e, u = tl.exp2(b), tl.exp2(a)
    e1 = e
    if USE_CE:
        e1 = tl.exp2(d * LOG2E)
    return e1, e, u, kept(d, d - mean), tl.where(u == 0.0, 0.0, a - b)


@triton.jit
def tile_terms(zs, ts, tops, scales, mean, STEPS: tl.constexpr, USE_CE: tl.constexpr):
    """Return the ``terms`` of all vectors: five tuples."""
    tops, scales = (per_row(tops[0]), per_row(tops[1])), (per_row(scales[0]), per_row(scales[1]))
    e1s, es, us, centers, gaps = (), (), (), (), ()
    for k in tl.static_range(STEPS):
        z, t = zs[k].to(tl.float32), ts[k].to(tl.float32)
        e1, e, u, center, gap = terms(z, t, tops, scales, per_row(mean), USE_CE)
        e1s, es, us = e1s + (e1,), es + (e,), us + (u,)  # type: ignore[assignment]  # noqa: RUF005
        centers, gaps = centers + (center,), gaps + (gap,)  # type: ignore[assignment]  # noqa: RUF005
    return e1s, es, us, centers, gaps


@triton.jit
def thread_sums(all_terms, STEPS: tl.constexpr):
    """Return the sums of e1, e, u, u (a - b), and of z - mean times e and u, of each thread, (ROWS, LANES).

    The last two are subtracted from each other. Relative to the maximum, as b is, their rounding errors would be larger
    than those of PyTorch.
    """
    e1s, es, us, centers, gaps = all_terms
    # Summed within a vector first, which needs fewer registers.
    sum_e1, sum_e, sum_u = tl.sum(e1s[0], 2), tl.sum(es[0], 2), tl.sum(us[0], 2)
    cross, of_e, of_u = us[0] * gaps[0], es[0] * centers[0], us[0] * centers[0]
    for k in tl.static_range(1, STEPS):
        sum_e1 += tl.sum(e1s[k], 2)
        sum_e += tl.sum(es[k], 2)
        sum_u += tl.sum(us[k], 2)
        cross = tl.fma(us[k], gaps[k], cross)
        of_e = tl.fma(es[k], centers[k], of_e)
        of_u = tl.fma(us[k], centers[k], of_u)
    return sum_e1, sum_e, sum_u, tl.sum(cross, 2), tl.sum(of_e, 2), tl.sum(of_u, 2)


@triton.jit
def read_terms(
    operands, start, columns, c, live, tops, scales, mean,
    USE_CE: tl.constexpr, STEPS: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr, soft,
):  # fmt: skip
    """Read a tile again and return its terms."""
    zs, ts = load_tile(operands, start, columns, c, live, True, STEPS, FULL, POLICY, None, soft)
    return tile_terms(zs, ts, tops, scales, mean, STEPS, USE_CE)


@triton.jit
def read_sums(
    operands, start, columns, c, live, tops, scales, mean,
    USE_CE: tl.constexpr, STEPS: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr, soft,
):  # fmt: skip
    """Read a tile again and return each thread's sums."""
    all_terms = read_terms(operands, start, columns, c, live, tops, scales, mean, USE_CE, STEPS, FULL, POLICY, soft)
    return thread_sums(all_terms, STEPS)


@triton.jit
def sweep_sums(
    operands, columns, c, live, tops, scales, mean, USE_CE: tl.constexpr, GRAD: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr, soft,
):  # fmt: skip
    """Return each thread's sums of a row of several tiles, which is read from its last tile on."""
    BLOCK: tl.constexpr = STEPS * columns.shape[1] * columns.shape[2]
    POLICY: tl.constexpr = "evict_last" if GRAD else "evict_first"
    sums = read_sums(
        operands, (TILES - 1) * BLOCK, columns, c, live, tops, scales, mean, USE_CE, LAST_STEPS, LAST_FULL, POLICY, soft
    )  # fmt: skip
    for j in range(0, TILES - 1):
        a, b, d, e, f, g = read_sums(
            operands, (TILES - 2 - j) * BLOCK, columns, c, live, tops, scales, mean, USE_CE, STEPS, STEPS, POLICY, soft
        )  # fmt: skip
        sums = add_six(sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], a, b, d, e, f, g)
    return sums


@triton.jit
def slope(e1, e, u, center, slopes, USE_CE: tl.constexpr):
    """Return the gradient without the one-hot term."""
    hard, soft, other, along = slopes
    g = tl.fma(center, along, tl.fma(u, -other, e * soft))
    if USE_CE:
        g = tl.fma(e1, hard, g)
    return g


@triton.jit
def store_gradient(
    base, start, columns, c, live, all_terms, slopes, USE_CE: tl.constexpr, STEPS: tl.constexpr, FULL: tl.constexpr,
    flat,
):  # fmt: skip
    """Store the gradient of a tile from its terms and ``slopes``, the coefficients of each row."""
    e1s, es, us, centers, _ = all_terms
    slopes = (per_row(slopes[0]), per_row(slopes[1]), per_row(slopes[2]), per_row(slopes[3]))
    for k in tl.static_range(STEPS):
        g = slope(e1s[k], es[k], us[k], centers[k], slopes, USE_CE)
        col = start + k * columns.shape[1] * columns.shape[2] + columns
        store_vector(base, col, g, c, live, k < FULL, flat)


@triton.jit
def sweep_gradients(
    operands, base, columns, c, live, tops, scales, mean, slopes, USE_CE: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr, soft, flat,
):  # fmt: skip
    """Read a row of several tiles again, from its first tile on, and store its gradient."""
    BLOCK: tl.constexpr = STEPS * columns.shape[1] * columns.shape[2]
    for i in range(0, TILES - 1):
        start = i * BLOCK
        all_terms = read_terms(
            operands, start, columns, c, live, tops, scales, mean, USE_CE, STEPS, STEPS, "evict_first", soft
        )  # fmt: skip
        store_gradient(base, start, columns, c, live, all_terms, slopes, USE_CE, STEPS, STEPS, flat)
    last = (TILES - 1) * BLOCK
    all_terms = read_terms(
        operands, last, columns, c, live, tops, scales, mean, USE_CE, LAST_STEPS, LAST_FULL, "evict_first", soft
    )  # fmt: skip
    store_gradient(base, last, columns, c, live, all_terms, slopes, USE_CE, LAST_STEPS, LAST_FULL, flat)


@triton.jit
def finish(top_z, count, spread, sums, z_label, factor, numbers, USE_CE: tl.constexpr):
    """Return the losses and the coefficients that ``slope`` takes, (ROWS,)."""
    sum_e1, sum_e, sum_u, cross, of_e, of_u = sums
    _, ce_factor, kl_factor, ce_slope, kl_slope = numbers
    loss = kl_factor * (LN2 * (cross / sum_u + tl.log2(sum_e / sum_u)))
    hard = factor
    if USE_CE:
        loss += ce_factor * (LN2 * tl.log2(sum_e1) - (z_label - top_z))
        hard = factor * ce_slope / sum_e1
    slope = factor * kl_slope / (spread + EPSILON)
    # The deviation takes the part along the centered logits from the gradient.
    along = slope * (of_u / sum_u - of_e / sum_e) / (spread + EPSILON)
    along = tl.where(spread == 0.0, 0.0, along / (spread * (count - 1.0)))
    return loss * factor, (hard, slope / sum_e, slope / sum_u, along)


@triton.jit
def standardized(
    operands, grad_base, columns, c, live, label, factor, numbers,
    USE_CE: tl.constexpr, GRAD: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr, hard, soft, flat,
):  # fmt: skip
    """Store the gradient of rows but for the label; return the losses and the gradient at the label, (ROWS,)."""
    if TILES == 1:
        zs, ts = load_tile(operands, 0, columns, c, live, True, LAST_STEPS, LAST_FULL, "evict_first", None, soft)
        top_z, top_t, _ = row_tops(thread_tops(zs, ts, LAST_STEPS, True, False), True, False)
        tops = (top_z, top_t)
        student, teacher = tile_spreads(zs, ts, tops, LAST_STEPS)
    else:
        z_base, z_col, t_base, t_col = operands
        top_z, student = sweep_spread(z_base, z_col, columns, c, live, TILES, STEPS, LAST_STEPS, LAST_FULL)
        top_t, teacher = sweep_spread(t_base, t_col, columns, c, live, TILES, STEPS, LAST_STEPS, LAST_FULL)
        tops = (top_z, top_t)
        if soft is not None:
            tops, teacher = own_teacher(soft, tops, student, teacher)
    count, mean, _ = student
    spread = deviation(student)
    z_label, t_label = at_label(operands, label, live, soft)
    scales = (numbers[0] / (spread + EPSILON), numbers[0] / (deviation(teacher) + EPSILON))
    if TILES == 1:
        all_terms = tile_terms(zs, ts, tops, scales, mean, LAST_STEPS, USE_CE)
        sums = thread_sums(all_terms, LAST_STEPS)
    else:
        sums = sweep_sums(
            operands, columns, c, live, tops, scales, mean, USE_CE, GRAD, TILES, STEPS, LAST_STEPS, LAST_FULL, soft
        )  # fmt: skip
    sums = tl.reduce(sums, 1, add_six)
    ce_logit = known(z_label, hard, soft)
    loss, slopes = finish(tops[0], count, spread, sums, ce_logit, factor, numbers, USE_CE)
    gradient = factor
    if GRAD:
        if TILES == 1:
            store_gradient(grad_base, 0, columns, c, live, all_terms, slopes, USE_CE, LAST_STEPS, LAST_FULL, flat)
        else:
            sweep_gradients(
                operands, grad_base, columns, c, live, tops, scales, mean, slopes,
                USE_CE, TILES, STEPS, LAST_STEPS, LAST_FULL, soft, flat,
            )  # fmt: skip
        if USE_CE:
            e1, e, u, center, _ = terms(z_label, t_label, tops, scales, mean, USE_CE)
            # The two large parts of the cross-entropy are subtracted first: where the label is almost certain, they
            # leave little.
            gradient = tl.fma(e1, slopes[0], -factor * numbers[3]) + slope(e1, e, u, center, slopes, False)
    return loss, gradient
