"""Products of a softmax head's Hessian with vectors, one tile of samples at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops.float32 import full_float32
from kdfast.ops.softmax_head.curvature import (
    add_fused_products,
    allocate_products,
    apply_logit_hessian_,
    can_fuse_products,
    curvature_propagates_nan,
)
from kdfast.ops.softmax_head.data import Features, HeadData, Tile
from kdfast.ops.softmax_head.residuals import LossConfig
from kdfast.ops.softmax_head.validation import Array, check_l2, check_tensor
from kdfast.progress import Progress

__all__ = ["check_vectors", "head_hvp", "hessian_products"]


@full_float32()
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
    """Multiply K vectors by the Hessian of F = (1/N) sum of losses + (l2 / 2) ||W||^2 at the head's weights.

    With A = X V^T and B = S A for each sample's curvature S, H V = B^T X / N + l2 V: two matrix products per tile of
    samples and one pass over A in between; nothing of size N K C is stored. For a few float32 vectors on a CPU with
    AVX-512, one kernel computes all three steps while the features are in the cache. For a linear head the Hessian is
    its Gauss-Newton matrix. It does not depend on labels and teacher logits.

    Args:
        features: (N, D') without the bias, tensor or (memory-mapped) array; or an iterable of blocks
            (features, logits), read once.
        logits: (N, C) of the head; None if ``features`` are blocks.
        v: (C, D) or (K, C, D); with a bias, D = D' + 1 and the bias is the last column.
        l2: Weight of the penalty, at least 0.
        bias: Whether the head has a bias.
        alpha: Weight of the divergence from a teacher in the loss (1 - alpha) CE + alpha T^2 KL.
        temperature: T > 0 of the divergence.
        tile_rows: Samples computed at a time; None chooses by cache size.
        progress: Called with (samples done, total or 0 if unknown, note).

    Returns:
        Products in the shape and dtype of ``v``. Computed in float64 if features, logits or ``v`` are, else in float32.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there are no rows, or a number is not finite.

    Source:
        Pearlmutter, "Fast exact multiplication by the Hessian", 1994; for the Gauss-Newton matrix, Martens, "Deep
        learning via Hessian-free optimization", 2010.
    """
    data = HeadData(features, logits, bias=bias, tile_rows=tile_rows)
    loss = LossConfig(alpha, temperature).check()
    check_l2(l2)
    vectors = as_vectors("v", v, data)
    dtype = torch.float64 if torch.float64 in (data.dtype, v.dtype) else torch.float32
    try:
        out = hessian_products(data, vectors.to(dtype), l2, loss, progress)
    except DataError:
        check_vectors("v", v, data)  # raises for v itself if it is not finite
        raise
    result = out.reshape(v.shape).to(v.dtype)
    if result.dtype != dtype and not bool(result.isfinite().all()):
        data.raise_nonfinite("the Hessian products", result.dtype)
    return result


def hessian_products(
    data: HeadData, v: Tensor, l2: float, loss: LossConfig, progress: Progress | None = None
) -> Tensor:
    """Return H V for ``v`` (K, C, D), in the dtype of ``v``.

    Raises:
        DataError: If a number of the data is not finite, or the products overflow.
    """
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    fused = can_fuse_products(v, data.bias)
    unfused = None if fused else _UnfusedProducts(data, v)
    deferred = ("features", "logits") if curvature_propagates_nan(v) else ("features",)
    width = 0 if fused else v[..., 0].numel()
    scale = 1 / data.num_rows if data.num_rows else 1.0  # the number of rows of blocks may be unknown here
    rows = 0
    for tile in data.tiles(width, v.dtype, progress, "Hessian products", deferred_checks=deferred, fused=fused):
        if unfused is None:
            add_fused_products(out, scale, tile.x, tile.z, v, data.bias, loss)
        else:
            unfused.add(out, scale, tile, v, loss)
        rows += len(tile.x)
    if scale == 1:
        out.div_(rows)
    if l2 > 0:
        out.add_(v, alpha=l2)
    if not math.isfinite(out.sum().item()) and not bool(out.isfinite().all()):
        data.raise_nonfinite("the Hessian products", out.dtype)
    return out


class _UnfusedProducts:
    """Two matrix products by torch with the curvature in between, in buffers of the largest tile's size."""

    def __init__(self, data: HeadData, v: Tensor) -> None:
        k, c, d = v.shape
        # One buffer serves all tiles: fresh memory would be mapped and zeroed for each.
        max_rows = data.rows_per_tile(k * c, v.dtype)
        self.products = allocate_products(max_rows, v)
        # The bias as a feature costs a copy of the features; as separate terms it costs passes over the products, which
        # is less if they are narrower.
        self.padded = v.new_ones(max_rows, d) if data.bias and 2 * k * c > d else None

    def add(self, out: Tensor, scale: float, tile: Tile, v: Tensor, loss: LossConfig) -> None:
        """Add ``scale`` B^T X of a tile to ``out``."""
        n, x, d = len(tile.x), tile.x, v.shape[2]
        flat_v, flat_out = v.reshape(-1, d), out.view(-1, d)
        products = self.products[:n]
        a = products.flatten(1)
        if self.padded is not None:
            x = self.padded[:n]
            x[:, :-1] = tile.x
        if x.shape[1] == d:
            torch.mm(x, flat_v.mT, out=a)
        else:
            torch.addmm(flat_v[:, -1], x, flat_v[:, :-1].mT, out=a)
        apply_logit_hessian_(products, tile.z, loss)
        flat_out[:, : x.shape[1]].addmm_(a.mT, x, alpha=scale)
        if x.shape[1] < d:
            flat_out[:, -1].add_(a.sum(0), alpha=scale)


def as_vectors(name: str, v: Tensor, data: HeadData) -> Tensor:
    """Return ``v`` as (K, C, D).

    Raises:
        ShapeError: If it is not a tensor, or its shape, device or dtype does not fit the data.
    """
    check_tensor(name, v)
    shape = (data.num_classes, data.dim)
    if v.dim() not in (2, 3) or tuple(v.shape[-2:]) != shape or v.numel() == 0:
        explanation = f"D = {data.dim} includes the bias" if data.bias else "there is no bias"
        raise ShapeError(
            f"`{name}` has shape {tuple(v.shape)}: pass {shape} or (K, {shape[0]}, {shape[1]}); {explanation}"
        )
    if v.device != data.device:
        raise ShapeError(f"`{name}` is on {v.device}, `features` on {data.device}: move them to one device")
    return v.detach().reshape(-1, *shape)


def check_vectors(name: str, v: Tensor, data: HeadData) -> Tensor:
    """Return ``v`` as (K, C, D) if valid and finite.

    Raises:
        ShapeError: As ``as_vectors``.
        DataError: If a number is not finite.
    """
    v = as_vectors(name, v, data)
    if not bool(v.sum().isfinite()) and not bool(v.isfinite().all()):
        raise DataError(f"`{name}` is not finite: correct its computation")
    return v
