"""Triton kernel of ``kd_loss`` for top-k teachers: the divergence over k + 1 outcomes, see ``topk_teacher``.

The last outcome, the tail, is any of the classes that the teacher leaves out. A program marks the teacher's classes
with one bit each in memory of its own, so that a sweep over the row learns which classes are in the tail at a cost that
does not depend on k. The sweep adds up the tail alone; vectors of k hold the other outcomes. The gradient is written as
if all classes were in the tail; then the label and the teacher's classes are written over it.

Up to 16,384 classes a row is one tile, read once. Longer rows are swept twice, forward for the sums and backward for
the gradient, so that the second sweep starts with what is still in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.ops.kd_loss.triton.common import LN2, LOG2E, exp_at_one, finite_or_zero, row_factors, row_indices
from kdfast.ops.triton_rows import processors

__all__ = ["launch_topk", "topk_kernel", "topk_shape"]


@triton.jit
def tile_columns(start, REPEAT: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr):
    """Return the words of marks and the columns of the tile from column ``start`` on.

    The shape of a tile is (REPEAT, WORDS, 64 / VECTOR, VECTOR): a word marks 64 columns, and a thread loads VECTOR of
    them at once.
    """
    word = start // 64 + tl.arange(0, REPEAT)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    within = tl.arange(0, 64 // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    return word[:, :, None, None], word[:, :, None, None] * 64 + within[None, None]


@triton.jit
def load_tile(z_base, col, z_col, read, WIDE: tl.constexpr, EVICT: tl.constexpr):
    """Load a tile of student logits with the columns from ``read`` on masked."""
    at = col.to(tl.int64) if WIDE else col
    return tl.load(z_base + at * z_col, mask=col < read, other=float("-inf"), eviction_policy=EVICT)


@triton.jit
def set_marks(marks, ids, present):
    """Mark the classes of a row that are present, after those of the previous row have been removed."""
    tl.debug_barrier()
    bit = tl.full((), 1, tl.int64) << (ids & 63)
    tl.atomic_or(marks + ids // 64, bit, mask=present, sem="relaxed", scope="cta")
    tl.debug_barrier()


@triton.jit
def remove_marks(marks, ids, present):
    """Remove the marks of a row after all threads have read them."""
    tl.debug_barrier()
    tl.store(marks + ids // 64, 0, mask=present)


@triton.jit
def mask_marked(z, marks, word, VECTOR: tl.constexpr):
    """Mask the marked classes of a tile."""
    marked = tl.load(marks + word, cache_modifier=".cg")
    marked = (marked >> (tl.arange(0, 64 // VECTOR) * VECTOR)[None, None, :, None]).to(tl.int32)
    return tl.where((marked & (1 << tl.arange(0, VECTOR))[None, None, None]) != 0, float("-inf"), z.to(tl.float32))


@triton.jit
def exponentials(d, scale, temperature, USE_CE: tl.constexpr, POWER: tl.constexpr):
    """Return exp(d / T) and exp(d)."""
    e = tl.exp2(d * scale)
    return e, exp_at_one(e, d, scale, temperature, POWER) if USE_CE else e


@triton.jit
def add_tile(x, top, total, total1, scale, temperature, USE_CE: tl.constexpr, POWER: tl.constexpr):
    """Add a tile of the tail to the maximum and the sums, at temperatures T and 1, that each thread has of its own."""
    new_top = tl.maximum(top, tl.max(tl.max(x, 3), 0))
    base = finite_or_zero(new_top)
    e, e1 = exponentials(x - base[None, :, :, None], scale, temperature, USE_CE, POWER)
    factor, factor1 = exponentials(top - base, scale, temperature, USE_CE, POWER)
    total = total * factor + tl.sum(tl.sum(e, 3), 0)
    if USE_CE:
        total1 = total1 * factor1 + tl.sum(tl.sum(e1, 3), 0)
    return new_top, total, total1


@triton.jit
def add_threads(top, total, total1, scale, temperature, USE_CE: tl.constexpr, POWER: tl.constexpr):
    """Return the maximum and the sums of the tail from those of all threads."""
    row_top = tl.max(top)
    factor, factor1 = exponentials(top - finite_or_zero(row_top), scale, temperature, USE_CE, POWER)
    row_total = tl.sum(total * factor)
    return row_top, row_total, tl.sum(total1 * factor1) if USE_CE else row_total


@triton.jit
def tail_gradient(e, e1, tail_kl, tail_ce, USE_CE: tl.constexpr):
    """Return the gradient of classes of the tail, without the one-hot term."""
    g = e * tail_kl
    if USE_CE:
        g += e1 * tail_ce
    return g


@triton.jit
def sum_row(x, scale, temperature, USE_CE: tl.constexpr, POWER: tl.constexpr):
    """Return the maximum and the sums of the tail of a row in one tile, and the terms of the sums."""
    top = tl.max(x)
    e, e1 = exponentials(x - finite_or_zero(top), scale, temperature, USE_CE, POWER)
    total = tl.sum(e)
    return top, total, tl.sum(e1) if USE_CE else total, e, e1


@triton.jit
def sum_tiles(
    z_base, marks, z_col, read, tiles, scale, temperature, USE_CE: tl.constexpr, POWER: tl.constexpr,
    WIDE: tl.constexpr, REPEAT: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return the maximum and the sums of the tail of a row in several tiles."""
    top = tl.full((WORDS, 64 // VECTOR), float("-inf"), tl.float32)
    total = tl.zeros((WORDS, 64 // VECTOR), tl.float32)
    total1 = tl.zeros((WORDS, 64 // VECTOR), tl.float32)
    for i in range(0, tiles):
        word, col = tile_columns(i * (REPEAT * WORDS * 64), REPEAT, WORDS, VECTOR)
        z = load_tile(z_base, col, z_col, read, WIDE, "evict_last")
        x = mask_marked(z, marks, word, VECTOR)
        top, total, total1 = add_tile(x, top, total, total1, scale, temperature, USE_CE, POWER)
    return add_threads(top, total, total1, scale, temperature, USE_CE, POWER)


@triton.jit
def store_tiles(
    out, z_base, z_col, c, read, tiles, base, tail_kl, tail_ce, scale, temperature, USE_CE: tl.constexpr,
    POWER: tl.constexpr, WIDE: tl.constexpr, REPEAT: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a row in several tiles, as if all classes were in the tail; start with the last tile."""
    for i in range(0, tiles):
        _, col = tile_columns((tiles - 1 - i) * (REPEAT * WORDS * 64), REPEAT, WORDS, VECTOR)
        z = load_tile(z_base, col, z_col, read, WIDE, "evict_first").to(tl.float32)
        e, e1 = exponentials(z - base, scale, temperature, USE_CE, POWER)
        g = tail_gradient(e, e1, tail_kl, tail_ce, USE_CE).to(out.dtype.element_ty)
        tl.store(out + col, g, mask=col < c, eviction_policy="evict_first")


@triton.jit
def at_largest(e, e_tail, x, x_tail):
    """Return x of the outcome with the largest e; 0 if it is -inf."""
    largest = tl.maximum(tl.max(e, 0), e_tail)
    kept = tl.max(tl.where(e == largest, x, float("-inf")), 0)
    return finite_or_zero(tl.where(e_tail == largest, x_tail, kept))


@triton.jit
def divergence(d, e, d_tail, sum_tail, vk, tail_logit, scale, REVERSE: tl.constexpr):
    """Return the divergence, in nats, and its derivatives w.r.t. the logits over T of the outcomes.

    ``d``, ``e`` and ``d_tail`` are the student's logits of the teacher's classes relative to the maximum of the row,
    their exponentials at temperature T, and the same of the maximum of the tail; ``vk`` and ``tail_logit`` are the
    logits of the teacher, the last one in float64: at a temperature it is T times a logarithm, not a rounded logit.
    """
    e_tail = sum_tail * tl.exp2(d_tail * scale)
    sum_e = tl.sum(e, 0) + e_tail
    top_q = finite_or_zero(tl.maximum(tl.max(vk, 0), tail_logit.to(tl.float32)))
    u = tl.exp2((vk - top_q) * scale)
    u_tail = tl.exp2((tail_logit - top_q).to(tl.float32) * scale)
    sum_u = tl.sum(u, 0) + u_tail
    # The teacher's logits are relative to that of the most probable outcome of the first distribution, so that the gaps
    # between the logarithms of both are small where this distribution is large, even if the logits are far apart.
    origin = at_largest(e, e_tail, vk, tail_logit.to(tl.float32)) if REVERSE else top_q
    gap = ((vk - origin) - d) * scale
    gap_tail = ((tail_logit - origin).to(tl.float32) - d_tail) * scale - tl.log2(sum_tail)
    per_e = 1.0 / sum_e
    per_u = 1.0 / sum_u
    ratio = tl.log2(sum_e * per_u) + (origin - top_q) * scale
    # The slope of the reverse divergence is a difference of gaps: near that outcome they must be relative to its gap.
    center = at_largest(e, e_tail, gap, gap_tail) if REVERSE else 0.0
    gap -= center
    gap_tail -= center
    weight = e if REVERSE else u
    weight_tail = e_tail if REVERSE else u_tail
    # An outcome of probability zero adds nothing, even if the other distribution's log-probability is infinite.
    cross = tl.sum(tl.where(weight == 0.0, 0.0, weight * gap), 0)
    cross += tl.where(weight_tail == 0.0, 0.0, weight_tail * gap_tail)
    if REVERSE:
        mean = cross * per_e
        kl = -(mean + center) - ratio
        slope = tl.where(e == 0.0, 0.0, e * (LN2 * per_e) * (mean - gap))
        slope_tail = tl.where(e_tail == 0.0, 0.0, e_tail * (LN2 * per_e) * (mean - gap_tail))
    else:
        kl = cross * per_u + ratio
        slope = e * per_e - u * per_u
        slope_tail = e_tail * per_e - u_tail * per_u
    return LN2 * kl, slope, slope_tail


@triton.jit
def load_outcomes(
    z_base, v_base, ids_base, tail_ptr, teacher_row, z_col, v_col, c, k, live, temperature, K_BLOCK: tl.constexpr
):  # fmt: skip
    """Return the teacher's class ids, clamped, which of them are present, and the logits of teacher and student.

    A class whose teacher's logit is -inf is not present, and stays in the tail. If an id is out of range, the student's
    logit is NaN, and with it the loss and the gradient of the row.
    """
    j = tl.arange(0, K_BLOCK)
    ids = tl.load(ids_base + j, mask=j < k, other=0)
    vk = tl.load(v_base + j.to(tl.int64) * v_col, mask=j < k, other=float("-inf")).to(tl.float32)
    tail_logit = tl.load(tail_ptr + teacher_row).to(tl.float64) * tl.full((), temperature, tl.float64)
    present = tl.where(live, vk, float("-inf")) != float("-inf")
    in_range = (ids >= 0) & (ids < c)
    ids = tl.minimum(tl.maximum(ids, 0), c - 1)
    zk = tl.load(z_base + ids.to(tl.int64) * z_col, mask=present, other=float("-inf")).to(tl.float32)
    return ids, present, vk, tail_logit, tl.where(in_range, zk, float("nan"))


@triton.jit(do_not_specialize=["k", "v_row"])
def topk_kernel(
    z_ptr,  # (N, C) student logits, strides z_row, z_col
    v_ptr,  # (M, k) teacher logits, strides v_row, v_col
    ids_ptr,  # (M, k) int32 classes, contiguous
    tail_ptr,  # (M,) float, log-mass of the classes left out
    marks_ptr,  # (programs, words of a row) int64, scratch
    label_ptr,  # (N,) int64
    rows_ptr,  # (N,) int64 teacher row of each sample
    weights_ptr,  # (N,) float
    mass_ptr,  # (PARTS,) float32, terms of the divisor of a mean
    loss_ptr,  # (N,) float32, out
    grad_ptr,  # (N, C) contiguous, out
    n,
    c,
    m,
    k,
    z_row,
    z_col,
    v_row,
    v_col,
    label_stride,
    rows_stride,
    ignore_index,
    temperature,
    ce_factor,
    kl_factor,
    grad_scale,
    USE_CE: tl.constexpr,
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
    REPEAT: tl.constexpr,
    WORDS: tl.constexpr,
    VECTOR: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Compute losses and gradient of every P-th row, for P programs.

    SINGLE: a row is one tile. WIDE: the offset of a column may exceed 31 bits. ALIGN divides C and the row stride.
    """
    # The values do not change, but the compiler learns that it may load vectors of ALIGN elements.
    c = c // ALIGN * ALIGN
    z_row = z_row // ALIGN * ALIGN
    first = tl.program_id(0).to(tl.int64)
    scale = LOG2E / temperature
    tiles = 1 if SINGLE else tl.cdiv(c, REPEAT * WORDS * 64)
    marks = marks_ptr + first * (tiles * REPEAT * WORDS)
    for i in range(0, tiles):
        tl.store(marks + i * REPEAT * WORDS + tl.arange(0, REPEAT * WORDS), 0)
    share = row_factors(first < n, first, weights_ptr, mass_ptr, False, HAS_MASS)

    for step in range(0, tl.cdiv(n - first, tl.num_programs(0))):
        r = first + step * tl.num_programs(0)
        live, bad, label, teacher_row = row_indices(
            r, r < n, label_ptr, rows_ptr, label_stride, rows_stride, ignore_index, c, m, True, HAS_LABELS, HAS_ROWS
        )
        read = tl.where(live, c, 0)  # number of columns to read: none of an ignored row
        z_base = z_ptr + r * z_row
        if SINGLE:
            word, col = tile_columns(0, REPEAT, WORDS, VECTOR)
            z = load_tile(z_base, col, z_col, read, WIDE, "evict_first")
        ids, present, vk, tail_logit, zk = load_outcomes(
            z_base, v_ptr + teacher_row * v_row, ids_ptr + teacher_row * k, tail_ptr, teacher_row, z_col, v_col, c, k,
            live, temperature, K_BLOCK,
        )  # fmt: skip
        z_label = tl.load(z_base + label * z_col, mask=live, other=0.0).to(tl.float32)
        set_marks(marks, ids, present)
        if SINGLE:
            x = mask_marked(z, marks, word, VECTOR)
            max_tail, sum_tail, sum_tail1, e, e1 = sum_row(x, scale, temperature, USE_CE, POWER)
        else:
            max_tail, sum_tail, sum_tail1 = sum_tiles(
                z_base, marks, z_col, read, tiles, scale, temperature, USE_CE, POWER, WIDE, REPEAT, WORDS, VECTOR
            )
        top = finite_or_zero(tl.maximum(tl.max(zk, 0), max_tail))
        e_k, e1_k = exponentials(zk - top, scale, temperature, USE_CE, POWER)
        kl, slope, slope_tail = divergence(zk - top, e_k, max_tail - top, sum_tail, vk, tail_logit, scale, REVERSE)
        factor = share
        if HAS_WEIGHTS:
            factor *= tl.load(weights_ptr + r).to(tl.float32)
        factor = tl.where(bad, float("nan"), factor)
        loss = kl_factor * kl
        _, factor1 = exponentials(max_tail - top, scale, temperature, USE_CE, POWER)
        if USE_CE:
            sum_e1 = tl.sum(e1_k, 0) + sum_tail1 * factor1
            loss += ce_factor * (LN2 * tl.log2(sum_e1) - (z_label - top))
        tl.store(loss_ptr + r, tl.where(live, loss * factor, 0.0))
        remove_marks(marks, ids, present)
        if GRAD:
            kl_slope = factor * grad_scale * kl_factor / temperature
            ce_slope = factor * grad_scale * ce_factor
            tail_kl = tl.where(live, kl_slope * slope_tail * tl.where(sum_tail == 0.0, 0.0, 1.0 / sum_tail), 0.0)
            tail_ce = tl.where(live, ce_slope / sum_e1 * factor1, 0.0) if USE_CE else 0.0
            # Relative to the maximum of the tail: relative to a far larger maximum the terms would underflow.
            base = finite_or_zero(max_tail)
            out = grad_ptr + r * c
            if SINGLE:
                g = tail_gradient(e, e1, tail_kl, tail_ce, USE_CE).to(grad_ptr.dtype.element_ty)
                tl.store(out + col, g, mask=col < c, eviction_policy="evict_first")
            else:
                store_tiles(
                    out, z_base, z_col, c, read, tiles, base, tail_kl, tail_ce, scale, temperature,
                    USE_CE, POWER, WIDE, REPEAT, WORDS, VECTOR,
                )  # fmt: skip
            g_k = kl_slope * slope
            if USE_CE:
                g_k += e1_k * (ce_slope / sum_e1) - tl.where(ids == label, ce_slope, 0.0)
                e, e1 = exponentials(z_label - base, scale, temperature, USE_CE, POWER)
                g = tail_gradient(e, e1, tail_kl, tail_ce, USE_CE) - ce_slope
                tl.debug_barrier()
                tl.store(out + label, g.to(grad_ptr.dtype.element_ty), mask=live)
            tl.debug_barrier()
            tl.store(out + ids, g_k.to(grad_ptr.dtype.element_ty), mask=present)


def topk_shape(c: int, k: int, itemsize: int, align: int) -> dict[str, int]:
    """Return the tile shape, the warps and the registers a thread of ``topk_kernel``.

    A tile is 32 elements a thread, and 16 for medium rows of several tiles, so that several rows fit on a processor and
    stay in the cache until the second sweep. The registers are what ptxas needs without spilling (sm_80, sm_90), except
    for 8 to 48 bytes of 8,193 to 16,384 classes, with float32 logits or at temperatures other than 1, 2 and 4: two
    sweeps need none, but as many instructions, and read the logits twice; 32 warps need 80 to 104.

    Args:
        c: Number of classes.
        k: Number of classes of the teacher.
        itemsize: Bytes of a logit.
        align: Power of two that divides C and the row stride.
    """
    vector = 16 // itemsize  # elements of a load of 16 bytes
    k_block = triton.next_power_of_2(k)
    block = max(64, triton.next_power_of_2(c))
    single = block <= 16384
    if single:
        warps = min(32, max(1, block // 1024, k_block // 256))
        registers = 255 if k_block > 64 * warps else 136 if k_block <= 32 * warps and align >= vector else 168
    elif c <= 65536:
        warps, block, registers = 8, 4096, 80
    else:
        warps, block, registers = 16, 16384 if align >= vector else 8192, 128
    words = min(block // 64, max(1, vector * warps // 2))
    shape = {"REPEAT": block // 64 // words, "WORDS": words, "VECTOR": vector, "K_BLOCK": k_block}
    return {"SINGLE": int(single), **shape, "num_warps": warps, "maxnreg": min(registers, 2048 // warps)}


def launch_topk(z: Tensor, v: Tensor, *tensors: Tensor, numbers: list[float], flags: dict[str, Any]) -> None:
    """Launch ``topk_kernel`` with as many programs as fit on the processors at once.

    Args:
        z: (N, C) student logits.
        v: (M, k) teacher logits.
        tensors: Class ids, tail, labels, rows, weights, terms of the divisor, losses and gradient, as in the kernel.
        numbers: The kernel's arguments from ``z_row`` to ``grad_scale``.
        flags: The kernel's flags but those of ``topk_shape``.
    """
    n, c = z.shape
    k = v.shape[1]
    shape = topk_shape(c, k, z.element_size(), flags["ALIGN"])
    words = shape["REPEAT"] * shape["WORDS"]
    resident = max(1, 65536 // (shape["maxnreg"] * 32 * shape["num_warps"]))
    programs = min(n, processors(z.device) * resident)
    marks = torch.empty(programs, triton.cdiv(c, 64 * words) * words, dtype=torch.int64, device=z.device)
    ids, tail, *others = tensors
    topk_kernel[(programs,)](z, v, ids, tail, marks, *others, n, c, v.shape[0], k, *numbers, **flags, **shape)
