"""Squared norms of per-sample gradients by the compiled kernels, in float32 on a CPU or a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.factors import Convolution, Geometry, OuterProduct, sizes_of
from kdfast.ops.grad_norms.reference import iter_chunks, unfold_patches
from kdfast.ops.native import WIDEST_ISA, extension

__all__ = ["DEPTHWISE", "DIRECT", "GRAM", "conv_squared_norms", "squared_norms"]

# Algorithms of the kernels. On a CPU, GRAM means the Gram matrices of pixels.
DIRECT, GRAM, DEPTHWISE = 0, 1, 2
_POINTWISE = Geometry((1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 1)


def squared_norms(factors: OuterProduct | Convolution, algorithm: str) -> Tensor:
    """Compute ``kdfast.ops.grad_norms.reference.squared_norms`` in float64."""
    if isinstance(factors, OuterProduct):
        if factors.a.shape[1] == 1:
            return reference.squared_norms(factors).double()
        return _outer_product(factors.a, factors.b, algorithm)
    a, b, geometry = factors.a, factors.b, factors.geometry
    if algorithm == "direct":
        if geometry.groups == a.shape[1]:
            return conv_squared_norms(a.contiguous(), b.contiguous(), geometry, DEPTHWISE)
        return conv_squared_norms(a, b, geometry, DIRECT)
    if not a.is_cuda:
        return conv_squared_norms(a, b, geometry, GRAM) if algorithm == "pixel" else _patch_gram(factors)
    # On a GPU, "pixel" uses cuBLAS matrix products; "gram" reads patches in place.
    if algorithm == "pixel":
        return reference.squared_norms(factors, algorithm).double()
    return conv_squared_norms(a, b, geometry, GRAM)


def conv_squared_norms(a: Tensor, b: Tensor, geometry: Geometry, algorithm: int, isa_limit: int = WIDEST_ISA) -> Tensor:
    """Compute the squared norms of a convolution's per-sample weight gradients, `(N,)` float64.

    Args:
        a: Inputs `(N, C, H, W)` in float32, any strides.
        b: Output gradients `(N, P, Ho, Wo)` in float32, any strides.
        geometry: Geometry of the convolution.
        algorithm: ``DIRECT``, ``GRAM``, or ``DEPTHWISE`` for one input channel per group.
        isa_limit: 0, 1 or 2 for baseline, x86-64-v3 or x86-64-v4, so that tests can compare instruction sets.

    Raises:
        ValueError: If the sizes are inconsistent.
    """
    call = extension.Convolution(
        a.data_ptr(),
        a.stride(),
        b.data_ptr(),
        b.stride(),
        (*a.shape, *b.shape[1:]),
        geometry.kernel,
        geometry.stride,
        geometry.dilation,
        (geometry.pads[0], geometry.pads[2]),
        geometry.groups,
        algorithm,
    )
    if a.is_cuda:
        partial = torch.empty(len(a), extension.conv_squared_norms_parts(call), dtype=torch.float64, device=a.device)
        with torch.cuda.device(a.device):
            extension.conv_squared_norms_cuda(call, partial.data_ptr(), torch.cuda.current_stream().cuda_stream)
        return partial.sum(1)
    out = torch.empty(len(a), dtype=torch.float64)
    extension.conv_squared_norms(call, out.data_ptr(), torch.get_num_threads(), isa_limit)
    return out


def _outer_product(a: Tensor, b: Tensor, algorithm: str) -> Tensor:
    """Treat a sequence as an image of one line under a 1x1 kernel."""
    line, grads = a.transpose(1, 2).unsqueeze(2), b.transpose(1, 2).unsqueeze(2)
    return conv_squared_norms(line, grads, _POINTWISE, DIRECT if algorithm == "direct" else GRAM)


def _patch_gram(factors: Convolution) -> Tensor:
    """Use Gram matrices of whole patches: cheaper than those of pixels where patches hardly overlap."""
    t, d, p, *_ = sizes_of(factors)
    groups = factors.geometry.groups
    out = []
    for chunk in iter_chunks(len(factors.a), t * d * groups * factors.a.element_size()):
        a = unfold_patches(factors.a[chunk], factors.geometry)
        b = factors.b[chunk].reshape(-1, p, t).transpose(1, 2)
        out.append(_outer_product(a, b, "gram").view(-1, groups).sum(1))
    return torch.cat(out)
