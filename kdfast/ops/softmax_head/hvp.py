"""Products of a softmax head's Hessian with vectors, a tile of samples at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops.softmax_head.data import Features, HeadData, Progress, Tile
from kdfast.ops.softmax_head.residuals import (
    Target,
    add_products,
    curvature_,
    curvature_shows_logits,
    products_are_fused,
    products_for,
)
from kdfast.ops.softmax_head.validation import Array, check_tensor

__all__ = ["check_vectors", "head_hvp", "hessian_products"]


def head_hvp(
    features: Features,
    logits: Array | None,
    v: Tensor,
    *,
    l2: float = 0.0,
    bias: bool = True,
    alpha: float = 0.0,
    temperature: float = 4.0,
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The Hessian of F = (1/N) sum of losses + (l2 / 2) ||W||^2 at the head's weights, times K vectors.

    With A = X V^T and B = S A for each sample's curvature S, H V = B^T X / N + l2 V: two matrix products, with one
    pass over A between them, for tiles of samples; nothing of size N K C is stored. A few vectors in float32 on a CPU
    with AVX-512 go through all three steps while their samples' features are in the cache. For a linear head the
    Hessian is its Gauss-Newton matrix. Labels and teacher logits do not enter it.

    Args:
        features: (N, D') without the bias, tensor or (memory-mapped) array; or an iterable of blocks
            (features, logits), read once.
        logits: (N, C) of the head; None when ``features`` are blocks.
        v: (C, D) or (K, C, D), D = D' + 1 with a bias, whose column is the last.
        l2: Weight of the penalty, at least 0.
        bias: Whether the head has a bias.
        alpha: Weight of the divergence from a teacher in the loss (1 - alpha) CE + alpha T^2 KL.
        temperature: T > 0 of the divergence.
        tile_rows: Samples computed at a time; None chooses by the size of a cache.
        progress: Called with (samples done, samples in all or 0, note).

    Returns:
        As ``v``. Computed in float64 when features, logits or ``v`` are, else in float32.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there is no row, or a number is not finite.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994; Martens, "Deep learning via Hessian-free
    optimization", 2010, for the Gauss-Newton matrix.
    """
    data = HeadData(features, logits, bias=bias, tile_rows=tile_rows)
    target = Target(alpha, temperature).check()
    if not 0 <= l2 < math.inf:
        raise ShapeError(f"l2 is {l2}: give a finite number of at least 0")
    vectors = as_vectors("v", v, data)
    dtype = torch.float64 if torch.float64 in (data.dtype, v.dtype) else torch.float32
    try:
        out = hessian_products(data, vectors.to(dtype), l2, target, progress)
    except DataError:
        check_vectors("v", v, data)  # if they are what is not finite
        raise
    result = out.reshape(v.shape).to(v.dtype)
    if result.dtype != dtype and not bool(result.isfinite().all()):
        data.explain("the Hessian's products", result.dtype)
    return result


def hessian_products(data: HeadData, v: Tensor, l2: float, target: Target, progress: Progress | None = None) -> Tensor:
    """H V for ``v`` (K, C, D), in the dtype of ``v``.

    Raises:
        DataError: If a number of the data is not finite, or the products overflow.
    """
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    fused = products_are_fused(v, data.bias)
    library = None if fused else _Library(data, v)
    unchecked = ("features", "logits") if curvature_shows_logits(v) else ("features",)
    width = 0 if fused else v[..., 0].numel()
    scale = 1 / data.total if data.total else 1.0  # of blocks the number of rows may not be known yet
    rows = 0
    for tile in data.tiles(width, v.dtype, progress, "Hessian products", unchecked=unchecked, piecewise=fused):
        if library is None:
            add_products(out, scale, tile.x, tile.z, v, data.bias, target)
        else:
            library.add(out, scale, tile, v, target)
        rows += len(tile.x)
    if scale == 1:
        out.div_(rows)
    if l2 > 0:
        out.add_(v, alpha=l2)
    if not math.isfinite(out.sum().item()) and not bool(out.isfinite().all()):
        data.explain("the Hessian's products", out.dtype)
    return out


class _Library:
    """Both products by the library, the curvature in between; with room for the largest tile's."""

    def __init__(self, data: HeadData, v: Tensor) -> None:
        k, c, d = v.shape
        # One buffer for all tiles: fresh memory would be mapped and cleared for each.
        most = data.rows_of_a_tile(k * c, v.dtype)
        self.products = products_for(most, v)
        # A bias as a feature costs a copy of the features; as more passes over narrow products, less.
        self.padded = v.new_ones(most, d) if data.bias and 2 * k * c > d else None

    def add(self, out: Tensor, scale: float, tile: Tile, v: Tensor, target: Target) -> None:
        """Adds ``scale`` B^T X of a tile."""
        n, x, d = len(tile.x), tile.x, v.shape[2]
        flat, into = v.reshape(-1, d), out.view(-1, d)
        each = self.products[:n]
        a = each.flatten(1)
        if self.padded is not None:
            x = self.padded[:n]
            x[:, :-1] = tile.x
        if x.shape[1] == d:
            torch.mm(x, flat.mT, out=a)
        else:
            torch.addmm(flat[:, -1], x, flat[:, :-1].mT, out=a)
        curvature_(each, tile.z, target)
        into[:, : x.shape[1]].addmm_(a.mT, x, alpha=scale)
        if x.shape[1] < d:
            into[:, -1].add_(a.sum(0), alpha=scale)


def as_vectors(name: str, v: Tensor, data: HeadData) -> Tensor:
    """``v`` as (K, C, D).

    Raises:
        ShapeError: If it is no tensor, or its shape, device or dtype do not fit the data.
    """
    check_tensor(name, v)
    shape = (data.classes, data.dim)
    if v.dim() not in (2, 3) or tuple(v.shape[-2:]) != shape or v.numel() == 0:
        counted = f"D = {data.dim} counts the bias" if data.bias else "there is no bias"
        raise ShapeError(
            f"{name} has shape {tuple(v.shape)}: {shape} or (K, {shape[0]}, {shape[1]}) is needed ({counted})"
        )
    if v.device != data.device:
        raise ShapeError(f"{name} is on {v.device}, the features are on {data.device}: move them to one device")
    if not v.dtype.is_floating_point:
        raise ShapeError(f"{name} is {v.dtype}: give floating-point numbers")
    return v.detach().reshape(-1, *shape)


def check_vectors(name: str, v: Tensor, data: HeadData) -> Tensor:
    """``v`` as (K, C, D), of finite numbers.

    Raises:
        ShapeError: As ``as_vectors``.
        DataError: If a number is not finite.
    """
    v = as_vectors(name, v, data)
    if not bool(v.sum().isfinite()) and not bool(v.isfinite().all()):
        raise DataError(f"{name} is not finite: look for what made it")
    return v
