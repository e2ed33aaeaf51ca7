"""What a program of the dense kernels does for its rows before it reads the logits: indices, factors and targets."""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton.common import finite_or_zero, row_factors, row_indices
from kdfast.ops.kd_loss.triton.tiles import mean_from

__all__ = ["find_rows", "row_operands", "smoothed_target"]


@triton.jit
def find_rows(
    label_ptr, rows_ptr, n, c, m, label_stride, rows_stride, ignore_index,
    USE_KL: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_ROWS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return the program's rows, which exist, what ``row_indices`` says of them, and a thread's columns of a vector."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = r < n
    r = tl.minimum(r, n - 1)  # rows of logits are loaded without a mask
    indices = row_indices(
        r, exists, label_ptr, rows_ptr, label_stride, rows_stride, ignore_index, c, m, USE_KL, HAS_LABELS, HAS_ROWS
    )
    columns = tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    if WIDE:
        columns = columns.to(tl.int64)
    return r, exists, indices, columns


@triton.jit
def row_operands(
    z_ptr, t_ptr, weights_ptr, mass_ptr, r, indices, strides, HAS_WEIGHTS: tl.constexpr, HAS_MASS: tl.constexpr,
):  # fmt: skip
    """Return the rows' factors, and their operands as ``load_tile`` takes them.

    ``strides`` are those of ``z_ptr`` and ``t_ptr``.
    """
    live, bad, _, teacher_row = indices
    z_row, z_col, t_row, t_col = strides
    factor = row_factors(live, r, weights_ptr, mass_ptr, HAS_WEIGHTS, HAS_MASS)
    factor = tl.where(bad, float("nan"), factor)
    return factor, (z_ptr + r * z_row, z_col, t_ptr + teacher_row * t_row, t_col)


@triton.jit
def smoothed_target(
    smoothing, z_label, operands, columns, c, live, hard, factor, numbers,
    TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr,
):  # fmt: skip
    """Return the mean logit relative to the label's, and the target's share of the gradient of a row and a class."""
    offset = mean_from(finite_or_zero(z_label), operands, columns, c, hard, TILES, STEPS, LAST_STEPS)
    smooth = factor * numbers[3] * smoothing
    return offset, smooth, tl.where(live, smooth / c, 0.0)
