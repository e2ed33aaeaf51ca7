"""Rows of the decoupled divergence: the label's class against all others, and the others among themselves.

The label is hidden from both rows, so that ``softmax`` and ``gradient`` see the other classes only. The probability of
the label follows from its odds against them, and no probability is formed as a difference from 1. So both parts are
accurate where the label is almost certain.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton.common import LN2, LOG2E
from kdfast.ops.kd_loss.triton.gradient import store_gradient, sweep_gradients
from kdfast.ops.kd_loss.triton.softmax import sweep_sums, tile_softmax
from kdfast.ops.kd_loss.triton.tiles import at_label

__all__ = ["decoupled"]


@triton.jit
def log1p(x):
    """Return log(1 + x) for x in [0, 1], also accurate for small x: the series of 2 artanh(x / (2 + x))."""
    s = x / (2.0 + x)
    q = s * s
    series = tl.fma(q, 1.0 / 15.0, 1.0 / 13.0)
    series = tl.fma(series, q, 1.0 / 11.0)
    series = tl.fma(series, q, 1.0 / 9.0)
    series = tl.fma(series, q, 1.0 / 7.0)
    series = tl.fma(series, q, 1.0 / 5.0)
    series = tl.fma(series, q, 1.0 / 3.0)
    return 2.0 * tl.fma(series * q, s, s)


@triton.jit
def odds(d, total):
    """Return the binary logarithm x of 2^d / total, the odds of the label against the others, and 2^-abs(x)."""
    x = d - tl.log2(total)
    return x, tl.where(x > 0.0, total * tl.exp2(-d), tl.exp2(d) / total)


@triton.jit
def probabilities(x, small):
    """Return the probability of the label and of the others, from ``odds``."""
    inverse = 1.0 / (1.0 + small)
    return tl.where(x > 0.0, 1.0, small) * inverse, tl.where(x > 0.0, small, 1.0) * inverse


@triton.jit
def pair_divergence(x_q, small_q, x_p, small_p):
    """Return KL((q, 1 - q) || (p, 1 - p)) from the odds of both; for q > 1/2 they are those of 1 - q and 1 - p."""
    inverse = 1.0 / (1.0 + small_q)
    q = small_q * inverse
    a = -tl.abs(x_q)
    b = tl.where(x_q > 0.0, -x_p, x_p)
    bits = tl.where(b > 0.0, tl.fma(q, a, inverse * b), q * (a - b))
    bits = tl.where(q == 0.0, tl.maximum(b, 0.0), bits)  # a may be infinite
    return LN2 * bits + (log1p(small_p) - log1p(small_q))


@triton.jit
def finish(tops, sums, z_label, t_label, factor, numbers, weights, USE_CE: tl.constexpr):
    """Return the losses, the coefficients that ``slope`` takes, and the gradient at the label, (ROWS,)."""
    top_z, top_t, _ = tops
    sum_e1, sum_e, sum_u, cross = sums
    scale, ce_factor, kl_factor, ce_slope, kl_slope = numbers
    first, second = weights
    d = z_label - top_z
    x_p, small_p = odds(d * scale, sum_e)
    x_q, small_q = odds((t_label - top_t) * scale, sum_u)
    p, p_rest = probabilities(x_p, small_p)
    q, q_rest = probabilities(x_q, small_q)
    second = tl.where(sum_u == 0.0, 0.0, second)  # the teacher masks all other classes
    others = LN2 * (cross * scale / sum_u + tl.log2(sum_e / sum_u))
    others = tl.where(sum_e == 0.0, float("inf"), others)
    divergence = tl.where(second == 0.0, 0.0, second * others)
    divergence += tl.where(first == 0.0, 0.0, first * pair_divergence(x_q, small_q, x_p, small_p))
    loss = kl_factor * divergence
    gap = first * tl.where((x_q > 0.0) & (x_p > 0.0), p_rest - q_rest, q - p)
    slope = factor * kl_slope
    soft = tl.where(sum_e == 0.0, 0.0, slope * (second + gap) / sum_e)
    other = tl.where(sum_u == 0.0, 0.0, slope * second / sum_u)
    hard, gradient = factor, -slope * gap
    if USE_CE:
        x_p1, small_p1 = odds(d * LOG2E, sum_e1)
        loss += tl.where(ce_factor == 0.0, 0.0, ce_factor * (LN2 * tl.maximum(-x_p1, 0.0) + log1p(small_p1)))
        _, rest = probabilities(x_p1, small_p1)
        of_ce = factor * ce_slope * rest
        hard = tl.where(sum_e1 == 0.0, 0.0, of_ce / sum_e1)
        gradient -= of_ce
    return loss * factor, (hard, soft, other), gradient


@triton.jit
def decoupled(
    operands, grad_base, columns, c, live, label, factor, numbers, weights,
    USE_CE: tl.constexpr, POWER: tl.constexpr, GRAD: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr, hard, soft, flat,
):  # fmt: skip
    """Store the gradient of rows but for the label; return the losses and the gradient at the label, (ROWS,)."""
    scale = numbers[0]
    z_label, t_label = at_label(operands, label, live, soft)
    if TILES == 1:
        _, tops, all_terms, sums = tile_softmax(
            operands, columns, c, live, scale, True, False, POWER, LAST_STEPS, LAST_FULL, label, soft
        )  # fmt: skip
    else:
        tops, sums = sweep_sums(
            operands, columns, c, live, scale, True, False, POWER, TILES, STEPS, LAST_STEPS, LAST_FULL, label, soft
        )  # fmt: skip
    # The softmax of a row with an infinite logit is NaN.
    z_label = tl.where(z_label == float("inf"), float("nan"), z_label)
    t_label = tl.where(t_label == float("inf"), float("nan"), t_label)
    loss, slopes, gradient = finish(tops, sums, z_label, t_label, factor, numbers, weights, USE_CE)
    if GRAD:
        if TILES == 1:
            store_gradient(
                grad_base, 0, columns, c, live, all_terms, slopes,
                USE_CE, True, False, POWER, LAST_STEPS, LAST_FULL, flat,
            )  # fmt: skip
        else:
            sweep_gradients(
                operands, grad_base, columns, c, live, tops, slopes, scale,
                USE_CE, True, False, POWER, TILES, STEPS, LAST_STEPS, LAST_FULL, label, soft, flat,
            )  # fmt: skip
    return loss, gradient
