"""Rows of the Jensen-Shannon divergence.

m is the mixture of both distributions, p and q. It is computed relative to the teacher's largest term, as
m = beta u + (1 - beta) (sum(u) / sum(e)) e. Since that needs both sums, a row of several tiles is swept three times:
for the sums, for the divergences from m, and for the gradient. The gradient has the form of the reverse divergence's,
with log(p / m) as the gap. Logarithms are binary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton.common import LN2, add_two, known
from kdfast.ops.kd_loss.triton.gradient import slope, store_gradient
from kdfast.ops.kd_loss.triton.softmax import add_e1, sweep_sums, terms, tile_softmax, tile_terms
from kdfast.ops.kd_loss.triton.tiles import at_label, load_tile, per_row, tile_scale

__all__ = ["jensen_shannon"]

LEAST = tl.constexpr(-1e4)  # 2^LEAST is 0


@triton.jit
def log_positive(x):
    """Return log(x) for x > 0 with a relative error of 1.4e-7, and something finite for 0 and less than 2^-126.

    x = m 2^n with m in [sqrt 1/2, sqrt 2), and log(m) / (m - 1) is a polynomial. ``tl.log2`` takes 15 instructions
    more.
    """
    bits = x.to(tl.int32, bitcast=True)
    above = bits - 0x3F3504F3
    r = (bits - (above & -0x800000)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(r, 0.1258370578289032, -0.20726975798606873)
    p = tl.fma(p, r, 0.21571560204029083)
    p = tl.fma(p, r, -0.23894481360912323)
    p = tl.fma(p, r, 0.28791624307632446)
    p = tl.fma(p, r, -0.3607036769390106)
    p = tl.fma(p, r, 0.48091062903404236)
    p = tl.fma(p, r, -0.7213473320007324)
    p = tl.fma(p, r, 1.4426950216293335)
    return tl.fma(p, r, (above >> 23).to(tl.float32))


@triton.jit
def log_ratios(z, t, e, u, tops, scale, mixture):
    """Return log(p / m) and log(q / m), finite also where the probability is zero."""
    of_teacher, of_student, ratio = mixture
    log_m = log_positive(tl.fma(e, of_student, u * of_teacher))
    p_m = (tl.maximum((z - tops[0]) * scale, LEAST) + ratio) - log_m
    return p_m, tl.maximum((t - tops[1]) * scale, LEAST) - log_m


@triton.jit
def mix(logits, all_terms, tops, scale, mixture, STEPS: tl.constexpr, soft):
    """Return the terms with log(p / m) as the gap, and each thread's sums of e log(p / m) and u log(q / m)."""
    zs, ts = logits
    es, roots, us, _ = all_terms
    relative_to, scale = (per_row(tops[0]), per_row(tops[1])), tile_scale(scale, soft)
    mixture = (mixture[0], per_row(mixture[1]), per_row(mixture[2]))
    p_m, q_m = log_ratios(zs[0].to(tl.float32), ts[0].to(tl.float32), es[0], us[0], relative_to, scale, mixture)
    logs, of_student, of_teacher = (p_m,), es[0] * p_m, us[0] * q_m
    for k in tl.static_range(1, STEPS):
        z, t = zs[k].to(tl.float32), ts[k].to(tl.float32)
        p_m, q_m = log_ratios(z, t, es[k], us[k], relative_to, scale, mixture)
        logs = logs + (p_m,)  # type: ignore[assignment]  # noqa: RUF005
        of_student = tl.fma(es[k], p_m, of_student)
        of_teacher = tl.fma(us[k], q_m, of_teacher)
    return (es, roots, us, logs), (tl.sum(of_student, 2), tl.sum(of_teacher, 2))


@triton.jit
def mix_tile(
    operands, start, columns, c, live, tops, scale, mixture,
    POWER: tl.constexpr, STEPS: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr, soft,
):  # fmt: skip
    """Read a tile again and return what ``mix`` does."""
    logits = load_tile(operands, start, columns, c, live, True, STEPS, FULL, POLICY, None, soft)
    relative_to = (per_row(tops[0]), per_row(tops[1]), per_row(tops[2]))
    all_terms = tile_terms(logits[0], logits[1], relative_to, scale, STEPS, True, False, POWER)
    return mix(logits, all_terms, tops, scale, mixture, STEPS, soft)


@triton.jit
def mixture_sums(
    operands, start, columns, c, live, tops, scale, mixture,
    STEPS: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr, soft,
):  # fmt: skip
    """Read a tile again and return each thread's sums of ``mix``."""
    _, sums = mix_tile(operands, start, columns, c, live, tops, scale, mixture, 0, STEPS, FULL, POLICY, soft)
    return sums


@triton.jit
def sweep_mixture(
    operands, columns, c, live, tops, scale, mixture, GRAD: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr, soft,
):  # fmt: skip
    """Return each thread's sums of a row of several tiles, which is read from its last tile on."""
    BLOCK: tl.constexpr = STEPS * columns.shape[1] * columns.shape[2]
    POLICY: tl.constexpr = "evict_last" if GRAD else "evict_first"
    sums = mixture_sums(
        operands, (TILES - 1) * BLOCK, columns, c, live, tops, scale, mixture, LAST_STEPS, LAST_FULL, POLICY, soft
    )  # fmt: skip
    for j in range(0, TILES - 1):
        more = mixture_sums(
            operands, (TILES - 2 - j) * BLOCK, columns, c, live, tops, scale, mixture, STEPS, STEPS, POLICY, soft
        )  # fmt: skip
        sums = (sums[0] + more[0], sums[1] + more[1])
    return sums


@triton.jit
def sweep_gradients(
    operands, base, columns, c, live, tops, slopes, scale, mixture, USE_CE: tl.constexpr, POWER: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr, soft, flat,
):  # fmt: skip
    """Read a row of several tiles again, from its first tile on, and store its gradient."""
    BLOCK: tl.constexpr = STEPS * columns.shape[1] * columns.shape[2]
    for i in range(0, TILES - 1):
        all_terms, _ = mix_tile(
            operands, i * BLOCK, columns, c, live, tops, scale, mixture, POWER, STEPS, STEPS, "evict_first", soft
        )  # fmt: skip
        store_gradient(
            base, i * BLOCK, columns, c, live, all_terms, slopes, USE_CE, True, True, POWER, STEPS, STEPS, flat
        )
    last = (TILES - 1) * BLOCK
    all_terms, _ = mix_tile(
        operands, last, columns, c, live, tops, scale, mixture, POWER, LAST_STEPS, LAST_FULL, "evict_first", soft
    )  # fmt: skip
    store_gradient(
        base, last, columns, c, live, all_terms, slopes, USE_CE, True, True, POWER, LAST_STEPS, LAST_FULL, flat
    )


@triton.jit
def finish(tops, sums, of_student, of_teacher, z_label, factor, numbers, weights, USE_CE: tl.constexpr):
    """Return the losses and the coefficients that ``slope`` takes, (ROWS,)."""
    sum_e1, sum_e, sum_u, _ = sums
    _, ce_factor, kl_factor, ce_slope, kl_slope = numbers
    beta, rest = weights
    mean = of_student / sum_e
    loss = kl_factor * (LN2 * (beta * (of_teacher / sum_u) + rest * mean))
    hard = factor
    if USE_CE:
        loss += ce_factor * (LN2 * tl.log2(sum_e1) - (z_label - tops[0]))
        hard = factor * ce_slope / sum_e1
    other = -factor * kl_slope * rest * LN2 / sum_e
    return loss * factor, (hard, other * mean, other)


@triton.jit
def jensen_shannon(
    operands, grad_base, columns, c, live, label, factor, numbers, weights,
    USE_CE: tl.constexpr, POWER: tl.constexpr, GRAD: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr, hard, soft, flat,
):  # fmt: skip
    """Store the gradient of rows but for the label; return the losses and the gradient at the label, (ROWS,)."""
    scale = numbers[0]
    if TILES == 1:
        logits, tops, all_terms, sums = tile_softmax(
            operands, columns, c, live, scale, True, False, POWER, LAST_STEPS, LAST_FULL, None, soft
        )  # fmt: skip
    else:
        tops, sums = sweep_sums(
            operands, columns, c, live, scale, True, False, POWER, TILES, STEPS, LAST_STEPS, LAST_FULL, None, soft
        )  # fmt: skip
    z_label, t_label = at_label(operands, label, live, soft)
    ratio = sums[2] / sums[1]
    mixture = (weights[0], weights[1] * ratio, tl.log2(ratio))
    if TILES == 1:
        all_terms, cross = mix(logits, all_terms, tops, scale, mixture, LAST_STEPS, soft)
    else:
        cross = sweep_mixture(
            operands, columns, c, live, tops, scale, mixture, GRAD, TILES, STEPS, LAST_STEPS, LAST_FULL, soft
        )  # fmt: skip
    of_student, of_teacher = tl.reduce(cross, 1, add_two)
    ce_logit = known(z_label, hard, soft)
    loss, slopes = finish(tops, sums, of_student, of_teacher, ce_logit, factor, numbers, weights, USE_CE)
    gradient = factor
    if GRAD:
        if TILES == 1:
            store_gradient(
                grad_base, 0, columns, c, live, all_terms, slopes,
                USE_CE, True, True, POWER, LAST_STEPS, LAST_FULL, flat,
            )  # fmt: skip
        else:
            sweep_gradients(
                operands, grad_base, columns, c, live, tops, slopes, scale, mixture,
                USE_CE, POWER, TILES, STEPS, LAST_STEPS, LAST_FULL, soft, flat,
            )  # fmt: skip
        if USE_CE:
            e, root, u, _ = terms(z_label, t_label, tops[0], tops[1], tops[2], scale, True, False, POWER)
            gap, _ = log_ratios(z_label, t_label, e, u, tops, scale, mixture)
            of_ce = add_e1(root, slopes[0], -factor * numbers[3], POWER)  # first, as in `standardized`
            gradient = of_ce + slope(e, root, u, gap, slopes, False, True, True, POWER)
    return loss, gradient
