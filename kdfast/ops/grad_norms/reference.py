"""Functions of per-sample gradients from their factors, in plain PyTorch.

Squared norms, also with weights of the elements, sums of squares over samples, and dot products. Only one chunk of
samples has its gradients formed at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.grad_norms.factors import (
    Convolution,
    DenseGrad,
    Derived,
    Embedding,
    Geometry,
    GradFactors,
    OuterProduct,
    Recomputed,
    sizes_of,
)

__all__ = [
    "dot_products",
    "iter_chunks",
    "iter_materialized",
    "materialize",
    "squared_norms",
    "sums_of_squares",
    "unfold_patches",
    "weighted_squared_norms",
]

# Approximate limit on scratch memory: samples are processed in chunks that fit, of at least one sample.
CHUNK_BYTES = 2**24


def squared_norms(factors: GradFactors, algorithm: str = "direct") -> Tensor:
    """Compute `||G_n||^2` of each sample, `(N,)`.

    Args:
        factors: Gradient factors in float32 or float64.
        algorithm: "direct", "gram" or "pixel" (see ``kdfast.ops.grad_norms.dispatch``); applies to outer products and
            convolutions.
    """
    if isinstance(factors, DenseGrad):
        return _squared(factors.b)
    if isinstance(factors, (Recomputed, Derived)):
        return _chunked(factors)
    if isinstance(factors, Embedding):
        return _embedding(factors)
    if isinstance(factors, OuterProduct):
        return _outer_product(factors.a, factors.b, algorithm)
    if algorithm == "pixel":
        return _pixel_gram(factors)
    n, p, g = len(factors.b), factors.b.shape[1], factors.geometry.groups
    out = factors.b.new_empty(n)
    for chunk in iter_chunks(n, _unfolded_bytes(factors, algorithm)):
        a = unfold_patches(factors.a[chunk], factors.geometry)  # (n g, T, d)
        b = factors.b[chunk].reshape(-1, p // g, a.shape[1]).transpose(1, 2)
        out[chunk] = _outer_product(a, b, algorithm).view(-1, g).sum(1)
    return out


def weighted_squared_norms(factors: GradFactors, weights: Tensor) -> Tensor:
    """Compute `sum_j w_j G_nj^2` of each sample, `(N,)`.

    Args:
        factors: Gradient factors in float32 or float64.
        weights: Factors of the squares, in the shape of the gradient of one sample and the dtype of the factors.
    """
    if isinstance(factors, OuterProduct) and factors.a.shape[1] == 1:
        a, b = factors.a[:, 0].square(), factors.b[:, 0].square()
        return (torch.mm(b, weights.reshape(b.shape[1], a.shape[1])) * a).sum(1)
    if isinstance(factors, Embedding):
        keys, grads = _rows_of_table(factors)
        squares = (grads.square() * weights[keys % factors.num_embeddings]).sum(1)
        return factors.b.new_zeros(len(factors.b)).index_add_(0, keys // factors.num_embeddings, squares)
    out = factors.b.new_empty(len(factors.b))
    for chunk, grads in iter_materialized([factors], weights.shape, copies=1):
        # Not a matrix product, which adds millions of terms one after the other.
        out[chunk] = grads.flatten(1).square().mul_(weights.flatten()).sum(1)
    return out


def sums_of_squares(factors: GradFactors, shape: Sequence[int]) -> Tensor:
    """Compute `sum_n G_n^2`, element by element: ``shape`` in float64.

    Args:
        factors: Gradient factors in float32 or float64.
        shape: Shape of the gradient of one sample.
    """
    if isinstance(factors, OuterProduct) and factors.a.shape[1] == 1:
        return torch.mm(factors.b[:, 0].square().T, factors.a[:, 0].square()).reshape(*shape).double()
    out = factors.b.new_zeros(*shape, dtype=torch.float64)
    if isinstance(factors, Embedding):
        keys, grads = _rows_of_table(factors)
        return out.index_add_(0, keys % factors.num_embeddings, grads.double().square_())
    for _, grads in iter_materialized([factors], shape, copies=1):
        out += grads.square().sum(0)
    return out


def dot_products(factors: GradFactors, vector: Tensor) -> Tensor:
    """Compute `<G_n, v>` of each sample, `(N,)` float64.

    The gradient of a linear or convolution layer is linear in its weight, so that `<G_n, v>` is the inner product of
    the output gradients and the outputs of the layer with the weight `v`.

    Args:
        factors: Gradient factors in float32 or float64.
        vector: `v`, in the shape of the gradient of one sample and the dtype of the factors.
    """
    b = factors.b
    if isinstance(factors, OuterProduct):
        products = torch.matmul(b, vector.reshape(b.shape[2], -1)) * factors.a
    elif isinstance(factors, Embedding):
        products = vector[factors.ids] * _without_padding(factors)
    elif isinstance(factors, Convolution):
        _, stride, dilation, (top, bottom, left, right), groups = factors.geometry
        a = F.pad(factors.a, (left, right, top, bottom))
        weight = vector.reshape(b.shape[1], -1, *factors.geometry.kernel)
        products = F.conv2d(a, weight, stride=stride, dilation=dilation, groups=groups) * b
    elif isinstance(factors, DenseGrad):
        products = b.reshape(-1, *vector.shape) * vector
    else:
        out = b.new_empty(len(b), dtype=torch.float64)
        for chunk, grads in iter_materialized([factors], vector.shape, copies=1):
            out[chunk] = (grads * vector).flatten(1).sum(1, dtype=torch.float64)
        return out
    return products.flatten(1).sum(1, dtype=torch.float64)


def iter_materialized(
    uses: Sequence[GradFactors], shape: Sequence[int], copies: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the sums over uses of the gradients of some samples at a time: slices of the samples, `(n, *shape)`.

    Args:
        uses: Gradient factors of all uses of a parameter.
        shape: Shape of the parameter.
        copies: Number of other tensors of the same size that the caller makes.
    """
    first = uses[0].b
    sample_bytes = torch.Size(shape).numel() * first.element_size() * (len(uses) + copies)
    for use in uses:
        if isinstance(use, Convolution):
            sizes = sizes_of(use)
            sample_bytes += sizes.positions * sizes.inputs * use.geometry.groups * first.element_size()
    for chunk in iter_chunks(len(first), sample_bytes):
        total = materialize(uses[0], shape, chunk)
        for use in uses[1:]:
            total = total + materialize(use, shape, chunk)
        yield chunk, total


def materialize(factors: GradFactors, shape: Sequence[int], chunk: slice) -> Tensor:
    """Form the gradients of a chunk of samples, `(n, *shape)`."""
    if isinstance(factors, DenseGrad):
        return factors.b[chunk].reshape(-1, *shape)
    if isinstance(factors, Recomputed):
        return factors.compute(chunk)
    if isinstance(factors, Derived):
        return factors.pull(materialize(factors.factors, factors.shape, chunk))
    if isinstance(factors, Embedding):
        b = _without_padding(factors)[chunk]
        keys = _row_keys(factors.ids[chunk], factors.num_embeddings).reshape(-1)
        out = b.new_zeros(len(b) * factors.num_embeddings, b.shape[2]).index_add_(0, keys, b.reshape(-1, b.shape[2]))
    elif isinstance(factors, OuterProduct):
        out = torch.bmm(factors.b[chunk].transpose(1, 2), factors.a[chunk])
    else:
        a = unfold_patches(factors.a[chunk], factors.geometry)
        out = torch.bmm(factors.b[chunk].reshape(a.shape[0], -1, a.shape[1]), a)
    return out.reshape(-1, *shape)


def _chunked(factors: Recomputed | Derived) -> Tensor:
    """Form the gradients of some samples at a time, then square."""
    out = factors.b.new_empty(len(factors.b))
    for chunk, grads in iter_materialized([factors], factors.shape):
        out[chunk] = _squared(grads)
    return out


def _squared(grads: Tensor) -> Tensor:
    """Return the squared norms of gradients `(n, ...)`."""
    return grads.reshape(len(grads), -1).square().sum(1)


def iter_chunks(n: int, sample_bytes: int) -> Iterator[slice]:
    """Yield slices of `range(n)` of at least one sample each and, where possible, at most ``CHUNK_BYTES``."""
    step = max(1, CHUNK_BYTES // max(1, sample_bytes))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def unfold_patches(a: Tensor, geometry: Geometry) -> Tensor:
    """Return the patch under the kernel at each position, `(n groups, T, d)`, of images a `(n, C, H, W)`."""
    (kh, kw), stride, dilation, pads, groups = geometry
    top, bottom, left, right = pads
    x = F.pad(a, (left, right, top, bottom)) if any(pads) else a
    x = F.unfold(x, (kh, kw), dilation=dilation, stride=stride)  # (n, C k, T)
    return x.reshape(x.shape[0] * groups, -1, x.shape[2]).transpose(1, 2)


def _unfolded_bytes(factors: Convolution, algorithm: str) -> int:
    """Bytes of one sample's patches and of what is computed from them."""
    t, d, p, *_ = sizes_of(factors)
    scratch = t * d + (d * p if algorithm == "direct" else 2 * t * t)
    return scratch * factors.geometry.groups * factors.a.element_size()


def _outer_product(a: Tensor, b: Tensor, algorithm: str) -> Tensor:
    n, t, d = a.shape
    p = b.shape[2]
    if t == 1:
        return a.square().sum((1, 2)) * b.square().sum((1, 2))
    out = a.new_empty(n)
    scratch = d * p if algorithm == "direct" else 2 * t * t
    for chunk in iter_chunks(n, scratch * a.element_size()):
        x, y = a[chunk], b[chunk]
        if algorithm == "direct":
            out[chunk] = torch.bmm(y.transpose(1, 2), x).square_().sum((1, 2))
        else:
            gram = torch.bmm(x, x.transpose(1, 2)).mul_(torch.bmm(y, y.transpose(1, 2)))
            out[chunk] = gram.sum((1, 2)).clamp_min_(0)  # rounding may turn a zero slightly negative
    return out


def _pixel_gram(factors: Convolution) -> Tensor:
    """Sum the Gram matrix of the padded pixels over the kernel offsets, then multiply it by that of the outputs."""
    (kh, kw), stride, dilation, (top, bottom, left, right), g = factors.geometry
    n, channels, h, w = factors.a.shape
    p, ho, wo = factors.b.shape[1:]
    high, wide = h + top + bottom, w + left + right
    out = factors.b.new_empty(n)
    for chunk in iter_chunks(n, (high * wide) ** 2 * g * factors.a.element_size()):
        a = F.pad(factors.a[chunk], (left, right, top, bottom)).reshape(-1, channels // g, high * wide)
        b = factors.b[chunk].reshape(-1, p // g, ho * wo)
        pixels = torch.bmm(a.transpose(1, 2), a).view(-1, high, wide, high, wide)
        patches = b.new_zeros(b.shape[0], ho, wo, ho, wo)
        for ky in range(0, kh * dilation[0], dilation[0]):
            for kx in range(0, kw * dilation[1], dilation[1]):
                y = slice(ky, ky + stride[0] * (ho - 1) + 1, stride[0])
                x = slice(kx, kx + stride[1] * (wo - 1) + 1, stride[1])
                patches += pixels[:, y, x, y, x]
        gram = torch.bmm(b.transpose(1, 2), b).mul_(patches.view(-1, ho * wo, ho * wo))
        out[chunk] = gram.sum((1, 2)).view(-1, g).sum(1).clamp_min_(0)
    return out


def _embedding(factors: Embedding) -> Tensor:
    keys, grads = _rows_of_table(factors)
    return factors.b.new_zeros(len(factors.b)).index_add_(0, keys // factors.num_embeddings, grads.square().sum(1))


def _rows_of_table(factors: Embedding) -> tuple[Tensor, Tensor]:
    """Return the ``_row_keys`` `(m,)` of all rows that samples look up, and each row's gradient, `(m, p)`.

    The gradients of a row that a sample looks up more than once are added.
    """
    p = factors.b.shape[2]
    keys, where = torch.unique(_row_keys(factors.ids, factors.num_embeddings), return_inverse=True)
    return keys, factors.b.new_zeros(len(keys), p).index_add_(
        0, where.reshape(-1), _without_padding(factors).reshape(-1, p)
    )


def _row_keys(ids: Tensor, num_embeddings: int) -> Tensor:
    """Number the table rows of all samples apart: `(n, T)`, sample times ``num_embeddings`` plus id."""
    return ids + num_embeddings * torch.arange(len(ids), device=ids.device).unsqueeze(1)


def _without_padding(factors: Embedding) -> Tensor:
    """Return the output gradients with those of the padding index set to zero."""
    return factors.b if factors.padding_idx is None else factors.b * (factors.ids != factors.padding_idx).unsqueeze(2)
