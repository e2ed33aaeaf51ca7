"""Functions shared by the Triton kernels of ``kd_loss``: exponentials, and the weights, labels and teacher rows."""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.triton_rows import PARTS

__all__ = [
    "LN2",
    "LOG2E",
    "add_four",
    "add_two",
    "exp_at_one",
    "finite_or_zero",
    "known",
    "own_numbers",
    "row_factors",
    "row_indices",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def add_two(a, b, other_a, other_b):
    """Add pairs, for a reduction."""
    return a + other_a, b + other_b


@triton.jit
def add_four(a, b, c, d, other_a, other_b, other_c, other_d):
    """Add quadruples, for a reduction."""
    return a + other_a, b + other_b, c + other_c, d + other_d


@triton.jit
def exp_at_one(e, d, log2e_t, temperature, POWER: tl.constexpr):
    """Return exp(d) from e = exp(d / T).

    POWER is 0 for T = 1, 1 and 2 for T = 2 and 4, where e is squared, and 3 for any other T.
    """
    if POWER == 1:
        e = e * e
    elif POWER == 2:
        e = e * e
        e = e * e
    elif POWER == 3:
        e = tl.exp2(d * (log2e_t * temperature))
    return e


@triton.jit
def finite_or_zero(m):
    """Return 0 for -inf, the maximum of a row without a finite logit, which must not be subtracted from itself."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def row_factors(live, r, weights_ptr, mass_ptr, HAS_WEIGHTS: tl.constexpr, HAS_MASS: tl.constexpr):
    """Return the factor of each row in the result: its weight, divided by the weight sum for a mean."""
    factor = tl.where(live, 1.0, 0.0)
    if HAS_WEIGHTS:
        factor = tl.load(weights_ptr + r, mask=live, other=0.0).to(tl.float32)
    if HAS_MASS:
        mass = tl.sum(tl.load(mass_ptr + tl.arange(0, PARTS)), 0)
        factor = tl.where(mass == 0.0, 0.0, factor / mass)
    return factor


@triton.jit
def scalar(x, ROWS: tl.constexpr):
    """Return the number of the only row, or those of several rows as they are."""
    return tl.sum(x, 0) if ROWS == 1 else x


@triton.jit
def known(z_label, hard, soft):
    """Return the label's logit for the cross-entropy, 0 in rows without one, whose product with 0 would be NaN."""
    if soft is not None:
        z_label = tl.where(hard, z_label, 0.0)
    return z_label


@triton.jit
def own_numbers(
    numbers, r, live, alphas_ptr, temperatures_ptr, T_SQUARED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Return the numbers of rows with an alpha or a temperature of their own, and which have each term.

    ``numbers`` are those for a weight of 1 of either term and T = 1, as far as rows have their own. Out of range, they
    become NaN.
    """
    scale, ce_factor, kl_factor, ce_slope, kl_slope = numbers
    scale = scale * scalar(tl.full((ROWS,), 1.0, tl.float32), ROWS)
    hard, soft = live, live
    if alphas_ptr is not None:
        alpha = tl.load(alphas_ptr + r, mask=live, other=0.5).to(tl.float32)
        alpha = tl.where((alpha >= 0.0) & (alpha <= 1.0), alpha, float("nan"))
        hard, soft = live & (alpha != 1.0), live & (alpha != 0.0)
        rest, alpha = scalar(1.0 - alpha, ROWS), scalar(alpha, ROWS)
        ce_factor, ce_slope, kl_factor, kl_slope = (
            ce_factor * rest,
            ce_slope * rest,
            kl_factor * alpha,
            kl_slope * alpha,
        )
    if temperatures_ptr is not None:
        t = tl.load(temperatures_ptr + r, mask=live, other=1.0).to(tl.float32)
        t = tl.where((t >= 1e-15) & (t <= 1e15), t, float("nan"))
        t = scalar(tl.where(soft, t, 1.0), ROWS)
        scale = scale / t
        kl_slope = kl_slope * t if T_SQUARED else kl_slope / t
        if T_SQUARED:
            kl_factor *= t * t
    return (scale, ce_factor, kl_factor, ce_slope, kl_slope), hard, soft


@triton.jit
def row_indices(
    r,
    live,
    label_ptr,
    rows_ptr,
    label_stride,
    rows_stride,
    ignore_index,
    c,
    m,
    USE_KL: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """Return which rows are not ignored and which have an index out of range, and clamped labels and teacher rows."""
    bad = r < 0
    label = r * 0
    exists = live
    if HAS_LABELS:
        label = tl.load(label_ptr + r * label_stride, mask=live, other=ignore_index)
        live = live & (label != ignore_index)
        bad = live & ((label < 0) | (label >= c))
        label = tl.minimum(tl.maximum(label, 0), c - 1)
    teacher_row = r
    if USE_KL:
        if HAS_ROWS:
            teacher_row = tl.load(rows_ptr + r * rows_stride, mask=exists, other=0)
        bad = bad | (live & ((teacher_row < 0) | (teacher_row >= m)))
        teacher_row = tl.minimum(tl.maximum(teacher_row, 0), m - 1)
    return live, bad, label, teacher_row
