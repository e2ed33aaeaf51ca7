"""What the Triton kernels of ``kd_loss`` share: exponentials, and what belongs to a row besides its logits."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LN2", "LOG2E", "finite", "picked_rows", "raised", "row_factors"]

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
def picked_rows(
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
    """Which rows count, which name something out of range, and the label and teacher row of each, clamped."""
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
    return live, bad, label, source
