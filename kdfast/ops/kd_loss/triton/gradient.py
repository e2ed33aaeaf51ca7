"""The gradient of a row of logits, from the terms of ``softmax`` and the coefficients that a divergence gives."""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton.softmax import add_e1, tile_terms
from kdfast.ops.kd_loss.triton.tiles import load_tile, per_row, store_vector

__all__ = ["slope", "store_gradient", "sweep_gradients"]


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
    base, start, columns, c, live, all_terms, slopes,
    USE_CE: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr,
    STEPS: tl.constexpr, FULL: tl.constexpr, flat=None,
):  # fmt: skip
    """Store the gradient of a tile from its terms and ``slopes``, the coefficients of each row."""
    es, roots, us, gaps = all_terms
    coefficients = (per_row(slopes[0]), per_row(slopes[1]), per_row(slopes[2]))
    for k in tl.static_range(STEPS):
        g = slope(es[k], roots[k], us[k], gaps[k], coefficients, USE_CE, USE_KL, REVERSE, POWER)
        col = start + k * columns.shape[1] * columns.shape[2] + columns
        store_vector(base, col, g, c, live, k < FULL, flat)


@triton.jit
def sweep_gradient(
    operands, base, start, columns, c, live, tops, slopes, scale,
    USE_CE: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr,
    STEPS: tl.constexpr, FULL: tl.constexpr, hidden=None, soft=None, flat=None,
):  # fmt: skip
    """Read a tile again and store its gradient."""
    zs, ts = load_tile(operands, start, columns, c, live, USE_KL, STEPS, FULL, "evict_first", hidden, soft)
    relative_to = (per_row(tops[0]), per_row(tops[1]), per_row(tops[2]))
    all_terms = tile_terms(zs, ts, relative_to, scale, STEPS, USE_KL, REVERSE, POWER)
    store_gradient(base, start, columns, c, live, all_terms, slopes, USE_CE, USE_KL, REVERSE, POWER, STEPS, FULL, flat)


@triton.jit
def sweep_gradients(
    operands, base, columns, c, live, tops, slopes, scale,
    USE_CE: tl.constexpr, USE_KL: tl.constexpr, REVERSE: tl.constexpr, POWER: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr, LAST_FULL: tl.constexpr,
    hidden=None, soft=None, flat=None,
):  # fmt: skip
    """Read a row of several tiles again, the last one first, and store its gradient."""
    BLOCK: tl.constexpr = STEPS * columns.shape[1] * columns.shape[2]
    sweep_gradient(
        operands, base, (TILES - 1) * BLOCK, columns, c, live, tops, slopes, scale,
        USE_CE, USE_KL, REVERSE, POWER, LAST_STEPS, LAST_FULL, hidden, soft, flat,
    )  # fmt: skip
    for j in range(0, TILES - 1):
        sweep_gradient(
            operands, base, (TILES - 2 - j) * BLOCK, columns, c, live, tops, slopes, scale,
            USE_CE, USE_KL, REVERSE, POWER, STEPS, STEPS, hidden, soft, flat,
        )  # fmt: skip
