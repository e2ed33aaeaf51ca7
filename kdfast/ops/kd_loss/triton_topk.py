"""Triton kernel of ``kd_loss`` for top-k teachers: the divergence over k + 1 outcomes, see ``topk_teacher``.

The last outcome, the tail, is any of the classes that the teacher leaves out. The logarithms of the outcomes are
float64: there are few of them, and if the logits are far apart, their differences are small compared to them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton_common import LN2, LOG2E, exp_at_one, finite_or_zero, row_factors, row_indices

__all__ = ["topk_kernel"]


@triton.jit
def mask_classes(z, col, start, ids_ptr, k, BLOCK: tl.constexpr):
    """Mask the teacher's classes in the tile that begins at column ``start``."""
    for j in range(0, k):
        at = tl.load(ids_ptr + j)
        if (at >= start) & (at < start + BLOCK):
            z = tl.where(col == at, float("-inf"), z)
    return z


@triton.jit
def divergence_term(log_x, log_y, shift):
    """Return x (log2(x / y) - shift) from the logarithms to base 2; 0 if x is 0, for any y."""
    x = tl.exp2(log_x)
    return tl.where(x == 0.0, 0.0, x * (log_x - log_y - shift))


@triton.jit
def divergence_slope(log_p, log_q, kl, REVERSE: tl.constexpr):
    """Return the derivative of the divergence, in nats, w.r.t. the logit of an outcome over T."""
    return divergence_term(log_p, log_q, kl) * LN2 if REVERSE else tl.exp2(log_p) - tl.exp2(log_q)


@triton.jit
def log2_probability(x, top, log_sum, scale):
    """Return log2 of the probabilities of logits, in float64."""
    return (x.to(tl.float64) - top) * scale - log_sum


@triton.jit
def accumulate(
    z,
    tail_z,
    max_z,
    max_tail,
    sum_e1,
    sum_e,
    sum_tail,
    scale,
    temperature,
    USE_CE: tl.constexpr,
    POWER: tl.constexpr,
):
    """Add a tile to the maxima and sums of all classes, at temperatures T and 1, and of the tail.

    ``tail_z`` is the tile with the teacher's classes masked.
    """
    new_max_z = tl.maximum(max_z, tl.max(z, 0))
    d = z - finite_or_zero(new_max_z)
    e = tl.exp2(d * scale)
    d_max = max_z - finite_or_zero(new_max_z)
    factor = tl.exp2(d_max * scale)
    sum_e = sum_e * factor + tl.sum(e, 0)
    if USE_CE:
        sum_e1 = sum_e1 * exp_at_one(factor, d_max, scale, temperature, POWER)
        sum_e1 += tl.sum(exp_at_one(e, d, scale, temperature, POWER), 0)
    new_max_tail = tl.maximum(max_tail, tl.max(tail_z, 0))
    sum_tail = sum_tail * tl.exp2((max_tail - finite_or_zero(new_max_tail)) * scale)
    sum_tail += tl.sum(tl.exp2((tail_z - finite_or_zero(new_max_tail)) * scale), 0)
    return new_max_z, new_max_tail, sum_e1, sum_e, sum_tail


@triton.jit
def divergence(
    z_base,
    v_base,
    ids_base,
    z_col,
    v_col,
    c,
    k,
    tail_logit,
    max_z,
    log_p,
    tail_p,
    scale64,
    REVERSE: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Compute the divergence in bits, from log2 of the probabilities of the outcomes for student (p) and teacher (q).

    Also returns the teacher's log2 probability of the tail, its largest logit and log2 of its normalizer, and whether a
    class id is out of range.
    """
    j = tl.arange(0, K_BLOCK)
    inside = j < k
    ids = tl.load(ids_base + j, mask=inside, other=0).to(tl.int64)
    bad_id = tl.max(tl.where(inside & ((ids < 0) | (ids >= c)), 1, 0), 0) > 0
    ids = tl.minimum(tl.maximum(ids, 0), c - 1)
    zk = tl.load(z_base + ids * z_col, mask=inside, other=float("-inf")).to(tl.float32)
    vk = tl.load(v_base + j.to(tl.int64) * v_col, mask=inside, other=float("-inf")).to(tl.float32)
    top_q = finite_or_zero(tl.maximum(tl.max(vk, 0).to(tl.float64), tail_logit))
    log_q = tl.log2(tl.sum(tl.exp2((vk.to(tl.float64) - top_q) * scale64), 0) + tl.exp2((tail_logit - top_q) * scale64))
    tail_q = log2_probability(tail_logit, top_q, log_q, scale64)
    each_p = log2_probability(zk, max_z, log_p, scale64)
    each_q = log2_probability(vk, top_q, log_q, scale64)
    if REVERSE:
        kl = tl.sum(tl.where(inside, divergence_term(each_p, each_q, 0.0), 0.0), 0)
        kl += divergence_term(tail_p, tail_q, 0.0)
        # The probabilities add up to 1 except for the rounding of the float32 sums, which the logarithms of logits that
        # are far apart would magnify.
        kl = kl / (tl.sum(tl.where(inside, tl.exp2(each_p), 0.0), 0) + tl.exp2(tail_p))
    else:
        kl = tl.sum(tl.where(inside, divergence_term(each_q, each_p, 0.0), 0.0), 0)
        kl += divergence_term(tail_q, tail_p, 0.0)
    return kl, tail_q, top_q, log_q, bad_id


@triton.jit
def topk_kernel(
    z_ptr,  # (N, C) student logits, strides z_row, z_col
    v_ptr,  # (M, k) teacher logits, strides v_row, v_col
    ids_ptr,  # (M, k) int32 classes, contiguous
    tail_ptr,  # (M,) float, log-mass of the classes left out
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
    BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Compute loss and gradient of one row."""
    NEG: tl.constexpr = float("-inf")
    r = tl.program_id(0).to(tl.int64)
    live = r < n  # always true, since there is one program per row
    factor = row_factors(live, r, weights_ptr, mass_ptr, HAS_WEIGHTS, HAS_MASS)
    live, bad, label, teacher_row = row_indices(
        r, live, label_ptr, rows_ptr, label_stride, rows_stride, ignore_index, c, m, True, HAS_LABELS, HAS_ROWS
    )
    z_base = z_ptr + r * z_row
    v_base = v_ptr + teacher_row * v_row
    ids_base = ids_ptr + teacher_row * k
    scale = LOG2E / temperature
    columns = tl.arange(0, BLOCK).to(tl.int64)
    tiles = tl.cdiv(c, BLOCK)
    read = tl.where(live, c, 0)  # number of columns to read: none of an ignored row

    max_z = tl.full((), NEG, tl.float32)
    max_tail = tl.full((), NEG, tl.float32)
    sum_e = tl.full((), 0.0, tl.float32)
    sum_e1 = tl.full((), 0.0, tl.float32)
    sum_tail = tl.full((), 0.0, tl.float32)
    for i in range(0, tiles):
        col = i * BLOCK + columns
        z = tl.load(z_base + col * z_col, mask=col < read, other=NEG, eviction_policy="evict_last").to(tl.float32)
        tail_z = mask_classes(z, col, i * BLOCK, ids_base, k, BLOCK)
        max_z, max_tail, sum_e1, sum_e, sum_tail = accumulate(
            z, tail_z, max_z, max_tail, sum_e1, sum_e, sum_tail, scale, temperature, USE_CE, POWER
        )

    temperature64 = tl.full((), temperature, tl.float64)
    scale64 = LOG2E / temperature64
    log_p = tl.log2(sum_e.to(tl.float64))
    tail_p = log2_probability(finite_or_zero(max_tail), max_z, log_p - tl.log2(sum_tail.to(tl.float64)), scale64)
    tail_p = tl.where(sum_tail == 0.0, NEG, tail_p)
    tail_logit = tl.load(tail_ptr + teacher_row).to(tl.float64) * temperature64
    kl, tail_q, top_q, log_q, bad_id = divergence(
        z_base, v_base, ids_base, z_col, v_col, c, k, tail_logit, max_z, log_p, tail_p, scale64, REVERSE, K_BLOCK
    )
    bad = bad | (live & bad_id)
    factor = tl.where(bad, float("nan"), tl.where(live, factor, 0.0))
    loss = kl_factor * (kl * LN2).to(tl.float32)
    if USE_CE:
        z_label = tl.load(z_base + label * z_col).to(tl.float32)
        loss += ce_factor * (LN2 * tl.log2(sum_e1) - (z_label - max_z))
    tl.store(loss_ptr + r, tl.where(live, loss * factor, 0.0))

    if GRAD:
        ce_slope = factor * grad_scale * ce_factor
        kl_slope = factor * grad_scale * kl_factor / temperature
        tail_slope = divergence_slope(tail_p, tail_q, kl, REVERSE).to(tl.float32)
        tail_slope = tl.where(sum_tail == 0.0, 0.0, kl_slope * tail_slope / sum_tail)
        for i in range(0, tiles):
            start = (tiles - 1 - i) * BLOCK
            col = start + columns
            z = tl.load(z_base + col * z_col, mask=col < read, other=NEG, eviction_policy="evict_first").to(tl.float32)
            # Relative to the maximum of the tail: relative to a far larger maximum the terms would underflow.
            g = tail_slope * tl.exp2((z - finite_or_zero(max_tail)) * scale)
            for a in range(0, k):
                at = tl.load(ids_base + a)
                if (at >= start) & (at < tl.minimum(start + BLOCK, c)):
                    z_at = tl.load(z_base + at.to(tl.int64) * z_col).to(tl.float32)
                    lp = log2_probability(z_at, max_z, log_p, scale64)
                    v_at = tl.load(v_base + (r * 0 + a) * v_col).to(tl.float32)
                    lq = log2_probability(v_at, top_q, log_q, scale64)
                    g = tl.where(col == at, kl_slope * divergence_slope(lp, lq, kl, REVERSE).to(tl.float32), g)
            if USE_CE:
                d = z - finite_or_zero(max_z)
                e1 = exp_at_one(tl.exp2(d * scale), d, scale, temperature, POWER)
                g += e1 * (ce_slope / sum_e1) - tl.where(col == label, ce_slope, 0.0)
            g = tl.where(live, g, 0.0).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + r * c + col, g, mask=col < c, eviction_policy="evict_first")
