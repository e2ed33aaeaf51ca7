"""Products of a softmax head's Hessian with vectors, a tile of samples at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops.head_checks import Array
from kdfast.ops.head_data import Features, HeadData, Progress
from kdfast.ops.head_rows import Target, curvature_, curvature_shows_logits, products_for

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
    pass over A between them, for tiles of samples; nothing of size N K C is stored. For a linear head the Hessian is
    its Gauss-Newton matrix. Labels and teacher logits do not enter it.

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
    vectors = check_vectors("v", v, data)
    dtype = torch.float64 if torch.float64 in (data.dtype, v.dtype) else torch.float32
    out = hessian_products(data, vectors.to(dtype), l2, target, progress)
    return out.reshape(v.shape).to(v.dtype)


def hessian_products(data: HeadData, v: Tensor, l2: float, target: Target, progress: Progress | None = None) -> Tensor:
    """H V for ``v`` (K, C, D), in the dtype of ``v``.

    Raises:
        DataError: If a number of the data is not finite, or the products overflow.
    """
    k, c, d = v.shape
    out = torch.zeros(k * c, d, dtype=v.dtype, device=v.device)
    flat = v.reshape(k * c, d)
    # One buffer for all tiles: fresh memory would be mapped and cleared for each.
    most = data.rows_of_a_tile(k * c, v.dtype)
    products = products_for(most, v)
    # A bias as a feature costs a copy of the features; as more passes over narrow products, less.
    padded = v.new_ones(most, d) if data.bias and 2 * k * c > d else None
    rows = 0
    unchecked = ("features", "logits") if curvature_shows_logits(v) else ("features",)
    for tile in data.tiles(k * c, v.dtype, progress, "Hessian products", unchecked=unchecked):
        each, x = products[: len(tile.x)], tile.x
        a = each.flatten(1)
        if padded is not None:
            x = padded[: len(tile.x)]
            x[:, :-1] = tile.x
        if x.shape[1] == d:
            torch.mm(x, flat.mT, out=a)
        else:
            torch.addmm(flat[:, -1], x, flat[:, :-1].mT, out=a)
        curvature_(each, tile.z, target)
        out[:, : x.shape[1]].addmm_(a.mT, x)
        if x.shape[1] < d:
            out[:, -1] += a.sum(0)
        rows += len(x)
    out = out.view(k, c, d).div_(rows)
    if l2 > 0:
        out.add_(v, alpha=l2)
    if not bool(out.sum().isfinite()) and not bool(out.isfinite().all()):
        data.explain("the Hessian's products", out.dtype)
    return out


def check_vectors(name: str, v: Tensor, data: HeadData) -> Tensor:
    """``v`` as (K, C, D).

    Raises:
        ShapeError: If shape, device or dtype do not fit the data.
        DataError: If a number is not finite.
    """
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
    v = v.detach()
    if not bool(v.sum().isfinite()) and not bool(v.isfinite().all()):
        raise DataError(f"{name} is not finite: look for what made it")
    return v.reshape(-1, *shape)
