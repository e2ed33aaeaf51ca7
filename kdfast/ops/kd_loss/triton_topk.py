"""Triton kernel of ``kd_loss`` for top-k teachers: the divergence over k + 1 outcomes, see ``topk_teacher``.

The outcomes' logarithms are float64: they are few, and where logits spread far their differences are small beside them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.ops.kd_loss.triton_common import LN2, LOG2E, finite, picked_rows, raised, row_factors

__all__ = ["topk_kernel"]


@triton.jit
def without(z, col, start, ids_ptr, k, BLOCK: tl.constexpr):
    """The tile that begins at column `start`, with the teacher's classes masked out."""
    for j in range(0, k):
        at = tl.load(ids_ptr + j)
        if (at >= start) & (at < start + BLOCK):
            z = tl.where(col == at, float("-inf"), z)
    return z


@triton.jit
def term(log_x, log_y, shift):
    """Return x (log2(x / y) - shift) from logarithms to base 2; zero where x is, whatever y is."""
    x = tl.exp2(log_x)
    return tl.where(x == 0.0, 0.0, x * (log_x - log_y - shift))


@triton.jit
def pull_of(log_p, log_q, kl, REVERSE: tl.constexpr):
    """Derivative of the divergence by an outcome's logit over T, in nats."""
    return term(log_p, log_q, kl) * LN2 if REVERSE else tl.exp2(log_p) - tl.exp2(log_q)


@triton.jit
def logs_of(x, top, log_sum, scale):
    """log2 of the probabilities of logits, in float64."""
    return (x.to(tl.float64) - top) * scale - log_sum


@triton.jit
def advance(
    z,
    other,
    max_z,
    max_o,
    sum_1,
    sum_z,
    sum_o,
    scale,
    temperature,
    USE_CE: tl.constexpr,
    POWER: tl.constexpr,
):
    """Take a tile into the normalisers of all classes, at T (z) and at 1 (1), and of those the teacher left out (o)."""
    top_z = tl.maximum(max_z, tl.max(z, 0))
    d = z - finite(top_z)
    e = tl.exp2(d * scale)
    lost = max_z - finite(top_z)
    shrink = tl.exp2(lost * scale)
    sum_z = sum_z * shrink + tl.sum(e, 0)
    if USE_CE:
        sum_1 = sum_1 * raised(shrink, lost, scale, temperature, POWER)
        sum_1 += tl.sum(raised(e, d, scale, temperature, POWER), 0)
    top_o = tl.maximum(max_o, tl.max(other, 0))
    sum_o = sum_o * tl.exp2((max_o - finite(top_o)) * scale)
    sum_o += tl.sum(tl.exp2((other - finite(top_o)) * scale), 0)
    return top_z, top_o, sum_1, sum_z, sum_o


@triton.jit
def divergence(
    z_base,
    v_base,
    ids_base,
    z_col,
    v_col,
    c,
    k,
    tail,
    max_z,
    log_p,
    rest_p,
    exact,
    REVERSE: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """The divergence in bits, from log2 of the student's (p) and the teacher's (q) probabilities of the outcomes.

    Also the teacher's log2 of the rest, its largest logit and log2 of its normaliser; and whether a class id lies
    outside its range.
    """
    j = tl.arange(0, K_BLOCK)
    inside = j < k
    ids = tl.load(ids_base + j, mask=inside, other=0).to(tl.int64)
    wild = tl.max(tl.where(inside & ((ids < 0) | (ids >= c)), 1, 0), 0) > 0
    ids = tl.minimum(tl.maximum(ids, 0), c - 1)
    zk = tl.load(z_base + ids * z_col, mask=inside, other=float("-inf")).to(tl.float32)
    vk = tl.load(v_base + j.to(tl.int64) * v_col, mask=inside, other=float("-inf")).to(tl.float32)
    top_q = finite(tl.maximum(tl.max(vk, 0).to(tl.float64), tail))
    log_q = tl.log2(tl.sum(tl.exp2((vk.to(tl.float64) - top_q) * exact), 0) + tl.exp2((tail - top_q) * exact))
    rest_q = logs_of(tail, top_q, log_q, exact)
    each_p = logs_of(zk, max_z, log_p, exact)
    each_q = logs_of(vk, top_q, log_q, exact)
    if REVERSE:
        kl = tl.sum(tl.where(inside, term(each_p, each_q, 0.0), 0.0), 0) + term(rest_p, rest_q, 0.0)
        # Their sum is one but for the float32 sums' rounding, which the logarithms of far-spread logits would magnify.
        kl = kl / (tl.sum(tl.where(inside, tl.exp2(each_p), 0.0), 0) + tl.exp2(rest_p))
    else:
        kl = tl.sum(tl.where(inside, term(each_q, each_p, 0.0), 0.0), 0) + term(rest_q, rest_p, 0.0)
    return kl, rest_q, top_q, log_q, wild


@triton.jit
def topk_kernel(
    z_ptr,  # (N, C) student logits, strides z_row, z_col
    v_ptr,  # (M, k) teacher logits, strides v_row, v_col
    ids_ptr,  # (M, k) int32 classes, contiguous
    tail_ptr,  # (M,) float, log-mass of the other classes
    label_ptr,  # (N,) int64
    rows_ptr,  # (N,) int64 rows of the teacher
    weights_ptr,  # (N,) float
    mass_ptr,  # () float32, what a mean divides by
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
    hold,
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
    """Loss and gradient of one row."""
    NEG: tl.constexpr = float("-inf")
    r = tl.program_id(0).to(tl.int64)
    live = r < n  # always; one program a row
    factor = row_factors(live, r, weights_ptr, mass_ptr, HAS_WEIGHTS, HAS_MASS)
    live, bad, label, source = picked_rows(
        r, live, label_ptr, rows_ptr, label_stride, rows_stride, ignore_index, c, m, True, HAS_LABELS, HAS_ROWS
    )
    z_base = z_ptr + r * z_row
    v_base = v_ptr + source * v_row
    ids_base = ids_ptr + source * k
    scale = LOG2E / temperature
    columns = tl.arange(0, BLOCK).to(tl.int64)
    tiles = tl.cdiv(c, BLOCK)
    read = tl.where(live, c, 0)  # columns to read: none of an ignored row

    max_z = tl.full((), NEG, tl.float32)
    max_o = tl.full((), NEG, tl.float32)
    sum_z = tl.full((), 0.0, tl.float32)
    sum_1 = tl.full((), 0.0, tl.float32)
    sum_o = tl.full((), 0.0, tl.float32)
    for i in range(0, tiles):
        col = i * BLOCK + columns
        z = tl.load(z_base + col * z_col, mask=col < read, other=NEG, eviction_policy="evict_last").to(tl.float32)
        other = without(z, col, i * BLOCK, ids_base, k, BLOCK)
        max_z, max_o, sum_1, sum_z, sum_o = advance(
            z, other, max_z, max_o, sum_1, sum_z, sum_o, scale, temperature, USE_CE, POWER
        )

    wide = tl.full((), temperature, tl.float64)
    exact = LOG2E / wide
    log_p = tl.log2(sum_z.to(tl.float64))
    rest_p = logs_of(finite(max_o), max_z, log_p - tl.log2(sum_o.to(tl.float64)), exact)
    rest_p = tl.where(sum_o == 0.0, NEG, rest_p)
    tail = tl.load(tail_ptr + source).to(tl.float64) * wide  # as a logit
    kl, rest_q, top_q, log_q, wild = divergence(
        z_base, v_base, ids_base, z_col, v_col, c, k, tail, max_z, log_p, rest_p, exact, REVERSE, K_BLOCK
    )
    bad = bad | (live & wild)
    factor = tl.where(bad, float("nan"), tl.where(live, factor, 0.0))
    loss = kl_factor * (kl * LN2).to(tl.float32)
    if USE_CE:
        z_label = tl.load(z_base + label * z_col).to(tl.float32)
        loss += ce_factor * (LN2 * tl.log2(sum_1) - (z_label - max_z))
    tl.store(loss_ptr + r, tl.where(live, loss * factor, 0.0))

    if GRAD:
        hard = factor * hold * ce_factor
        soft = factor * hold * kl_factor / temperature
        pull = pull_of(rest_p, rest_q, kl, REVERSE).to(tl.float32)
        pull = tl.where(sum_o == 0.0, 0.0, soft * pull / sum_o)
        for i in range(0, tiles):
            start = (tiles - 1 - i) * BLOCK
            col = start + columns
            z = tl.load(z_base + col * z_col, mask=col < read, other=NEG, eviction_policy="evict_first").to(tl.float32)
            # Relative to their own largest: beside a very confident choice the others' terms would underflow.
            g = pull * tl.exp2((z - finite(max_o)) * scale)
            for a in range(0, k):
                at = tl.load(ids_base + a)
                if (at >= start) & (at < tl.minimum(start + BLOCK, c)):
                    lp = logs_of(tl.load(z_base + at.to(tl.int64) * z_col).to(tl.float32), max_z, log_p, exact)
                    lq = logs_of(tl.load(v_base + (r * 0 + a) * v_col).to(tl.float32), top_q, log_q, exact)
                    g = tl.where(col == at, soft * pull_of(lp, lq, kl, REVERSE).to(tl.float32), g)
            if USE_CE:
                d = z - finite(max_z)
                e1 = raised(tl.exp2(d * scale), d, scale, temperature, POWER)
                g += e1 * (hard / sum_1) - tl.where(col == label, hard, 0.0)
            g = tl.where(live, g, 0.0).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + r * c + col, g, mask=col < c, eviction_policy="evict_first")
