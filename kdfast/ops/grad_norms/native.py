"""Functions of per-sample gradients by the compiled kernels, in float32 on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.factors import Convolution, Geometry, OuterProduct, sizes_of
from kdfast.ops.grad_norms.reference import iter_chunks, unfold_patches
from kdfast.ops.native import WIDEST_ISA, extension

__all__ = [
    "DEPTHWISE",
    "DIRECT",
    "GRAM",
    "conv_squared_norms",
    "conv_sums_of_squares",
    "squared_norms",
    "sums_of_squares",
    "weighted_squared_norms",
]

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


def weighted_squared_norms(factors: OuterProduct | Convolution, weights: Tensor) -> Tensor:
    """Compute ``kdfast.ops.grad_norms.reference.weighted_squared_norms`` in float64."""
    if isinstance(factors, OuterProduct):
        if factors.a.shape[1] == 1:
            return reference.weighted_squared_norms(factors, weights).double()
        factors = _as_convolution(factors)
    algorithm = _elementwise_algorithm(factors)
    return conv_squared_norms(factors.a, factors.b, factors.geometry, algorithm, weights=weights)


def sums_of_squares(factors: OuterProduct | Convolution, shape: Sequence[int]) -> Tensor:
    """Compute ``kdfast.ops.grad_norms.reference.sums_of_squares``."""
    if isinstance(factors, OuterProduct):
        if factors.a.shape[1] == 1:
            return reference.sums_of_squares(factors, shape)
        factors = _as_convolution(factors)
    found = conv_sums_of_squares(factors.a, factors.b, factors.geometry, _elementwise_algorithm(factors))
    return found.reshape(*shape)


def conv_squared_norms(
    a: Tensor,
    b: Tensor,
    geometry: Geometry,
    algorithm: int,
    isa_limit: int = WIDEST_ISA,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute the squared norms of a convolution's per-sample weight gradients, `(N,)` float64.

    Args:
        a: Inputs `(N, C, H, W)` in float32, any strides.
        b: Output gradients `(N, P, Ho, Wo)` in float32, any strides.
        geometry: Geometry of the convolution.
        algorithm: ``DIRECT``, ``GRAM``, or ``DEPTHWISE`` for one input channel per group.
        isa_limit: 0, 1 or 2 for baseline, x86-64-v3 or x86-64-v4, so that tests can compare instruction sets.
        weights: Factors of the squares in float32, as many as the weight has elements and in their order; None for 1.
            Not with ``GRAM``.

    Raises:
        ValueError: If the sizes are inconsistent.
    """
    weights = None if weights is None else weights.contiguous()
    call = _convolution(a, b, geometry, algorithm, weights=weights)
    if a.is_cuda:
        partial = torch.empty(len(a), extension.conv_squared_norms_parts(call), dtype=torch.float64, device=a.device)
        with torch.cuda.device(a.device):
            extension.conv_squared_norms_cuda(call, partial.data_ptr(), torch.cuda.current_stream().cuda_stream)
        return partial.sum(1)
    out = torch.empty(len(a), dtype=torch.float64)
    extension.conv_squared_norms(call, out.data_ptr(), torch.get_num_threads(), isa_limit)
    return out


def conv_sums_of_squares(
    a: Tensor, b: Tensor, geometry: Geometry, algorithm: int, isa_limit: int = WIDEST_ISA
) -> Tensor:
    """Compute the sum over samples of the squares of a convolution's weight gradients, in the weight's shape, float64.

    Args:
        a: As for ``conv_squared_norms``.
        b: As for ``conv_squared_norms``.
        geometry: As for ``conv_squared_norms``.
        algorithm: ``DIRECT``, or ``DEPTHWISE`` for one input channel per group.
        isa_limit: As for ``conv_squared_norms``.

    Raises:
        ValueError: If the sizes are inconsistent.
    """
    shape = (b.shape[1], a.shape[1] // geometry.groups, *geometry.kernel)
    if a.is_cuda:
        parts = extension.conv_sums_of_squares_parts(_convolution(a, b, geometry, algorithm))
        partial = torch.zeros(parts, *shape, dtype=torch.float64, device=a.device)
        call = _convolution(a, b, geometry, algorithm, squares=partial)
        with torch.cuda.device(a.device):
            extension.conv_squared_norms_cuda(call, 0, torch.cuda.current_stream().cuda_stream)
        return partial.sum(0)
    squares = torch.zeros(shape, dtype=torch.float64)
    call = _convolution(a, b, geometry, algorithm, squares=squares)
    extension.conv_squared_norms(call, 0, torch.get_num_threads(), isa_limit)
    return squares


def _convolution(
    a: Tensor,
    b: Tensor,
    geometry: Geometry,
    algorithm: int,
    weights: Tensor | None = None,
    squares: Tensor | None = None,
) -> extension.Convolution:
    return extension.Convolution(
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
        0 if weights is None else weights.data_ptr(),
        0 if squares is None else squares.data_ptr(),
    )


def _elementwise_algorithm(factors: Convolution) -> int:
    return DEPTHWISE if factors.geometry.groups == factors.a.shape[1] else DIRECT


def _as_convolution(factors: OuterProduct) -> Convolution:
    """Return a sequence as an image of one line under a 1x1 kernel."""
    line, grads = factors.a.transpose(1, 2).unsqueeze(2), factors.b.transpose(1, 2).unsqueeze(2)
    return Convolution(line, grads, _POINTWISE)


def _outer_product(a: Tensor, b: Tensor, algorithm: str) -> Tensor:
    line = _as_convolution(OuterProduct(a, b))
    return conv_squared_norms(line.a, line.b, line.geometry, DIRECT if algorithm == "direct" else GRAM)


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
