"""Rows of logits in tiles: how many columns a thread has, and how it loads and stores them.

A thread reads STEPS vectors of VECTOR neighboring columns from each tile, LANES threads share a row, and a program has
ROWS rows. The number of classes decides how many, see ``tile_shape``:

- A short row is one tile, which is read once and kept in registers for the gradient.
- A long row is swept several times, each time from the end at which the last sweep stopped, so that a sweep starts with
  the tiles that are still in the cache.

The number of instructions limits the kernels, so that only the last vectors of a row are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "NEG_INF", "at_label", "load_steps", "load_tile", "mean_from", "per_row", "per_thread", "store_vector",
    "store_zeros", "tile_scale", "tile_shape",
]  # fmt: skip

NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def per_row(x):
    """Broadcast (ROWS,) over the columns of a tile."""
    return x[:, None, None]


@triton.jit
def per_thread(x):
    """Broadcast (ROWS, LANES) over the columns of each thread."""
    return x[:, :, None]


@triton.jit
def tile_scale(scale, soft):
    """Broadcast a scale over the columns of a tile if rows have their own, see ``own_numbers``."""
    if soft is not None:  # noqa: SIM102 (Triton evaluates both sides of `and`)
        if soft.shape[0] > 1:
            scale = per_row(scale)
    return scale


@triton.jit
def inside(col, c, rows):
    """Return which columns exist, in some rows, (ROWS,); the only row is one of them."""
    mask = col < c
    if rows.shape[0] > 1:
        mask = mask & per_row(rows)
    return mask


@triton.jit
def load_steps(base, start, columns, stride, c, live, STEPS: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr):
    """Load the vectors of a tile, each (ROWS, LANES, VECTOR); those after the first FULL may end after the row.

    Several rows are loaded without a mask, since the compiler makes each of several masked loads wait for the one
    before. They are all read, live or not; a vector after the end is the last one of its row, see ``mask_steps``.
    """
    vectors = ()
    for k in tl.static_range(STEPS):
        col = start + k * columns.shape[1] * columns.shape[2] + columns
        if k < FULL:
            x = tl.load(base + col * stride, eviction_policy=POLICY)
        elif live.shape[0] > 1:
            x = tl.load(base + (col - beyond(start, k, columns, c)) * stride, eviction_policy=POLICY)
        else:
            x = tl.load(base + col * stride, mask=col < c, other=NEG_INF, eviction_policy=POLICY)
        vectors = vectors + (x,)  # type: ignore[assignment]  # noqa: RUF005
    return vectors


@triton.jit
def beyond(start, k, columns, c):
    """Return how many columns after the last vector of a row the k-th vector of each thread lies, (1, LANES, 1)."""
    LANES: tl.constexpr = columns.shape[1]
    VECTOR: tl.constexpr = columns.shape[2]
    first = start + (k * LANES + tl.arange(0, LANES)[None, :, None]) * VECTOR
    return tl.multiple_of(tl.maximum(first + VECTOR - c, 0), (VECTOR, VECTOR, VECTOR)).to(columns.dtype)


@triton.jit
def mask_steps(vectors, start, columns, c, live, STEPS: tl.constexpr, FULL: tl.constexpr):
    """Replace what ``load_steps`` loaded of several rows in place of columns after the end."""
    masked = ()
    for k in tl.static_range(STEPS):
        x = vectors[k]
        if k >= FULL:  # noqa: SIM102 (Triton evaluates both sides of `and`)
            if live.shape[0] > 1:
                col = columns + (start + k * columns.shape[1] * columns.shape[2])
                x = tl.where(col < c, x, NEG_INF)
        masked = masked + (x,)  # type: ignore[assignment]  # noqa: RUF005
    return masked


@triton.jit
def load_tile(
    operands, start, columns, c, live,
    USE_KL: tl.constexpr, STEPS: tl.constexpr, FULL: tl.constexpr, POLICY: tl.constexpr, hidden=None, soft=None,
):  # fmt: skip
    """Load the vectors of student and teacher.

    ``operands`` are their row pointers and column strides. ``hidden`` is a class of each row, (ROWS,), that counts as
    masked. Rows outside ``soft``, (ROWS,), have the student's logits as the teacher's.
    """
    z_base, z_col, t_base, t_col = operands
    zs = load_steps(per_row(z_base), start, columns, z_col, c, live, STEPS, FULL, POLICY)
    ts = zs
    if USE_KL:
        ts = load_steps(per_row(t_base), start, columns, t_col, c, live, STEPS, FULL, POLICY)
        ts = mask_steps(ts, start, columns, c, live, STEPS, FULL)
    zs = mask_steps(zs, start, columns, c, live, STEPS, FULL)
    if not USE_KL:
        ts = zs
    if soft is not None:
        ts = teach_oneself(zs, ts, soft, STEPS)
    if hidden is not None:
        zs = hide(zs, start, columns, hidden, STEPS)
        ts = hide(ts, start, columns, hidden, STEPS)
    return zs, ts


@triton.jit
def at_label(operands, label, live, soft=None):
    """Load the logits of student and teacher at the label of each row."""
    z_base, z_col, t_base, t_col = operands
    z = tl.load(z_base + label * z_col, mask=live, other=0.0).to(tl.float32)
    t = tl.load(t_base + label * t_col, mask=live, other=0.0).to(tl.float32)
    if soft is not None:
        t = tl.where(soft, t, z)
    return z, t


@triton.jit
def teach_oneself(zs, ts, soft, STEPS: tl.constexpr):
    """Replace the teacher's logits in rows without a divergence, which is then 0 whatever they hold."""
    vectors = ()
    for k in tl.static_range(STEPS):
        t = tl.where(per_row(soft), ts[k].to(tl.float32), zs[k].to(tl.float32))
        vectors = vectors + (t,)  # type: ignore[assignment]  # noqa: RUF005
    return vectors


@triton.jit
def mean_from(pivot, operands, columns, c, live, TILES: tl.constexpr, STEPS: tl.constexpr, LAST_STEPS: tl.constexpr):
    """Return the mean of z - pivot over all classes of each row, (ROWS,)."""
    base, stride, _, _ = operands
    total = tl.zeros((base.shape[0], columns.shape[1], columns.shape[2]), tl.float32)
    for k in range(0, (TILES - 1) * STEPS + LAST_STEPS):
        col = k * columns.shape[1] * columns.shape[2] + columns
        mask = (col < c) & per_row(live)
        z = tl.load(per_row(base) + col * stride, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        total += tl.where(mask, z - per_row(pivot), 0.0)
    return tl.sum(tl.sum(total, 2), 1) / c


@triton.jit
def hide(vectors, start, columns, hidden, STEPS: tl.constexpr):
    """Mask a class of each row."""
    others = ()
    for k in tl.static_range(STEPS):
        col = start + k * columns.shape[1] * columns.shape[2] + columns
        others = others + (tl.where(col == per_row(hidden.to(columns.dtype)), NEG_INF, vectors[k]),)  # type: ignore[assignment]  # noqa: RUF005
    return others


@triton.jit
def store_vector(base, col, x, c, rows, FULL: tl.constexpr, flat=None):
    """Store a vector of some rows, (ROWS,), less ``flat`` of each row; one that is FULL ends before the row does."""
    if flat is not None:
        x = x - per_row(flat)
    x = x.to(base.dtype.element_ty)
    if FULL and rows.shape[0] == 1:
        tl.store(per_row(base) + col, x, eviction_policy="evict_first")
    elif FULL:
        tl.store(per_row(base) + col, x, mask=per_row(rows), eviction_policy="evict_first")
    else:
        tl.store(per_row(base) + col, x, mask=inside(col, c, rows), eviction_policy="evict_first")


@triton.jit
def store_zeros(base, columns, c, exists, STEPS: tl.constexpr):
    """Store zeros in rows of STEPS vectors."""
    zero = tl.zeros((base.shape[0], columns.shape[1], columns.shape[2]), base.dtype.element_ty)
    for k in range(0, STEPS):
        col = k * columns.shape[1] * columns.shape[2] + columns
        tl.store(per_row(base) + col, zero, mask=inside(col, c, exists), eviction_policy="evict_first")


def tile_shape(classes: int, vector: int, reverse: bool, swept: int = 32) -> dict[str, int]:
    """Return the tiles and the warps of a dense kernel, for vectors of ``vector`` elements.

    A thread has up to 32 elements of a tile, or ``swept`` in a row of several tiles: with more, ptxas spills registers
    (sm_90); with fewer, the instructions for a tile weigh more. The longer a row of several tiles, the more warps it
    has, of 84 to 128 registers a thread. Rows that 132 multiprocessors process at a time are then at most 44 MB of
    half-precision logits up to 65,536 classes, so that a cache of 50 MB still has them when they are read again.
    """
    power = triton.next_power_of_2(classes)
    single = power <= (4096 if reverse else 8192)
    rows = warps = 1
    if power <= 512:
        # The threads of a row read at least eight neighboring elements at a time.
        lanes = max(power // 32, min(8 // vector, triton.next_power_of_2(triton.cdiv(classes, 8))))
        rows = 32 // lanes
    else:
        warps = max(1, power // 1024) if single else min(16, max(4, power // 4096))
        lanes = 32 * warps
    width = lanes * vector
    steps = (32 if single else swept) // vector
    tiles = 1 if single else triton.cdiv(classes, steps * width)
    last = classes - (tiles - 1) * steps * width
    shape = {
        "ROWS": rows, "LANES": lanes, "VECTOR": vector, "STEPS": steps, "TILES": tiles,
        "LAST_STEPS": triton.cdiv(last, width), "LAST_FULL": last // width, "num_warps": warps,
    }  # fmt: skip
    return {**shape, "maxnreg": 128} if warps == 8 and not single else shape
