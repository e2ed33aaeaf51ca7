"""Squared norms of per-sample gradients from their factors, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.grad_norms.dispatch import Sizes, pick
from kdfast.ops.grad_norms.factors import Convolution, Geometry, Lookup, Part, Rows, Small

__all__ = ["materialise", "sizes_of", "squares"]

# Of scratch memory at a time: chunks of samples, at least one, that fit into about so much.
CHUNK_BYTES = 2**24


def squares(part: Part, method: str = "auto") -> Tensor:
    """`||G_n||^2` of each sample, `(N,)`, of a gradient in one part.

    Args:
        part: Factors in float32 or float64.
        method: One of ``kdfast.ops.grad_norms.dispatch.METHODS``, for rows and convolutions.
    """
    if isinstance(part, Small):
        return part.grad.flatten(1).square().sum(1)
    if isinstance(part, Lookup):
        return _lookup(part)
    if isinstance(part, Rows):
        return _rows(part.a, part.b, pick(sizes_of(part), method))
    way = pick(sizes_of(part), method)
    if way == "pixel":
        return _pixel(part)
    n, p, g = len(part.b), part.b.shape[1], part.geometry.groups
    out = part.b.new_empty(n)
    for chunk in chunks(n, _bytes_unfolded(part, way)):
        a = unfolded(part.a[chunk], part.geometry)  # (n g, T, d)
        b = part.b[chunk].reshape(-1, p // g, a.shape[1]).transpose(1, 2)
        out[chunk] = _rows(a, b, way).view(-1, g).sum(1)
    return out


def sizes_of(part: Rows | Convolution) -> Sizes:
    """What the rule looks at."""
    if isinstance(part, Rows):
        return Sizes(part.a.shape[1], part.a.shape[2], part.b.shape[2])
    (kh, kw), stride, dilation, _, groups = part.geometry
    phases = 1
    for k, s, d in zip((kh, kw), stride, dilation, strict=True):
        phases *= len({i * d % s for i in range(k)})
    offsets = kh * kw
    channels, outputs = part.a.shape[1] // groups, part.b.shape[1] // groups
    return Sizes(part.b.shape[2] * part.b.shape[3], channels * offsets, outputs, offsets, phases)


def materialise(part: Part, shape: Sequence[int], chunk: slice) -> Tensor:
    """The gradients themselves of some samples, `(n, *shape)`."""
    if isinstance(part, Small):
        return part.grad[chunk].reshape(-1, *shape)
    if isinstance(part, Lookup):
        ids, b = part.ids[chunk], _counted(part)[chunk]
        flat = (ids + part.rows * torch.arange(len(ids), device=ids.device).unsqueeze(1)).reshape(-1)
        out = b.new_zeros(len(ids) * part.rows, b.shape[2]).index_add_(0, flat, b.reshape(-1, b.shape[2]))
    elif isinstance(part, Rows):
        out = torch.bmm(part.b[chunk].transpose(1, 2), part.a[chunk])
    else:
        a = unfolded(part.a[chunk], part.geometry)
        out = torch.bmm(part.b[chunk].reshape(a.shape[0], -1, a.shape[1]), a)
    return out.reshape(-1, *shape)


def chunks(n: int, sample_bytes: int) -> Iterator[slice]:
    """Slices of `range(n)` with at least one sample and at most ``CHUNK_BYTES`` where that can be."""
    step = max(1, CHUNK_BYTES // max(1, sample_bytes))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def unfolded(a: Tensor, geometry: Geometry) -> Tensor:
    """The patches under the kernel at each position: `(n groups, T, d)` of images `(n, C, H, W)`, as a view of them."""
    (kh, kw), stride, dilation, pads, groups = geometry
    top, bottom, left, right = pads
    x = F.pad(a, (left, right, top, bottom)) if any(pads) else a
    x = F.unfold(x, (kh, kw), dilation=dilation, stride=stride)  # (n, C k, T)
    return x.reshape(x.shape[0] * groups, -1, x.shape[2]).transpose(1, 2)


def _bytes_unfolded(part: Convolution, way: str) -> int:
    """Of one sample's patches, and of what is made of them."""
    t, d, p, *_ = sizes_of(part)
    return (t * d + (d * p if way == "direct" else 2 * t * t)) * part.geometry.groups * part.a.element_size()


def _rows(a: Tensor, b: Tensor, way: str) -> Tensor:
    n, t, d = a.shape
    p = b.shape[2]
    if t == 1:
        return a.square().sum((1, 2)) * b.square().sum((1, 2))
    out = a.new_empty(n)
    scratch = d * p if way == "direct" else 2 * t * t
    for chunk in chunks(n, scratch * a.element_size()):
        x, y = a[chunk], b[chunk]
        if way == "direct":
            out[chunk] = torch.bmm(y.transpose(1, 2), x).square_().sum((1, 2))
        else:
            gram = torch.bmm(x, x.transpose(1, 2)).mul_(torch.bmm(y, y.transpose(1, 2)))
            out[chunk] = gram.sum((1, 2)).clamp_min_(0)  # a zero may be rounded to a little less
    return out


def _pixel(part: Convolution) -> Tensor:
    """Gram matrices of padded pixels, read at each of the kernel's offsets."""
    (kh, kw), stride, dilation, (top, bottom, left, right), g = part.geometry
    n, channels, h, w = part.a.shape
    p, ho, wo = part.b.shape[1:]
    high, wide = h + top + bottom, w + left + right
    out = part.b.new_empty(n)
    for chunk in chunks(n, (high * wide) ** 2 * g * part.a.element_size()):
        a = F.pad(part.a[chunk], (left, right, top, bottom)).reshape(-1, channels // g, high * wide)
        b = part.b[chunk].reshape(-1, p // g, ho * wo)
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


def _counted(part: Lookup) -> Tensor:
    """Output gradients with those of the padding index at zero."""
    return part.b if part.skipped is None else part.b * (part.ids != part.skipped).unsqueeze(2)


def _lookup(part: Lookup) -> Tensor:
    """Rows of the table that a sample looks up more than once are summed before they are squared."""
    n, _, p = part.b.shape
    keys = part.ids + part.rows * torch.arange(n, device=part.ids.device).unsqueeze(1)
    found, where = torch.unique(keys, return_inverse=True)
    grads = part.b.new_zeros(len(found), p).index_add_(0, where.reshape(-1), _counted(part).reshape(-1, p))
    return part.b.new_zeros(n).index_add_(0, found // part.rows, grads.square().sum(1))
