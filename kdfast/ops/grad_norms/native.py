"""Squared norms of per-sample gradients by the compiled kernels: float32, on a CPU or a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.dispatch import pick
from kdfast.ops.grad_norms.factors import Convolution, Geometry, Part, Rows
from kdfast.ops.grad_norms.reference import chunks, sizes_of, unfolded
from kdfast.ops.native import extension

__all__ = ["DEPTHWISE", "DIRECT", "GRAM", "ghost_conv", "squares"]

# The kernels' ways; on a CPU, the Gram matrices are those of pixels.
DIRECT, GRAM, DEPTHWISE = 0, 1, 2
_WIDEST_ISA = 2
_ONE = Geometry((1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 1)


def squares(part: Part, method: str = "auto") -> Tensor:
    """As ``kdfast.ops.grad_norms.reference.squares``, in float64."""
    if isinstance(part, Rows) and part.a.shape[1] > 1:
        return _rows(part.a, part.b, pick(sizes_of(part), method))
    if not isinstance(part, Convolution):
        return reference.squares(part, method).double()
    way = pick(sizes_of(part), method)
    if way == "direct":
        if part.geometry.groups == part.a.shape[1]:
            return ghost_conv(part.a.contiguous(), part.b.contiguous(), part.geometry, DEPTHWISE)
        return ghost_conv(part.a, part.b, part.geometry, DIRECT)
    if not part.a.is_cuda:
        return ghost_conv(part.a, part.b, part.geometry, GRAM) if way == "pixel" else _unfolded(part)
    # On a GPU pixels go through the library's matrix products, and patches are read where they lie.
    if way == "pixel":
        return reference.squares(part, way).double()
    return ghost_conv(part.a, part.b, part.geometry, GRAM)


def ghost_conv(a: Tensor, b: Tensor, geometry: Geometry, way: int, isa_limit: int = _WIDEST_ISA) -> Tensor:
    """Squared norms `(N,)`, float64, of a convolution's per-sample weight gradients.

    Args:
        a: Inputs `(N, C, H, W)` in float32, any strides.
        b: Output gradients `(N, P, Ho, Wo)` in float32, any strides.
        geometry: Of the convolution.
        way: ``DIRECT``, ``GRAM``, or ``DEPTHWISE`` for one input channel a group.
        isa_limit: 0, 1, 2 for baseline, x86-64-v3, x86-64-v4, so that tests can compare instruction sets.

    Raises:
        ValueError: Sizes do not fit.
    """
    call = extension.GhostConv(
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
        way,
    )
    if a.is_cuda:
        parts = torch.empty(len(a), extension.ghost_parts(call), dtype=torch.float64, device=a.device)
        with torch.cuda.device(a.device):
            extension.ghost_conv_cuda(call, parts.data_ptr(), torch.cuda.current_stream().cuda_stream)
        return parts.sum(1)
    out = torch.empty(len(a), dtype=torch.float64)
    extension.ghost_conv(call, out.data_ptr(), torch.get_num_threads(), isa_limit)
    return out


def _rows(a: Tensor, b: Tensor, way: str) -> Tensor:
    """A sequence is an image of one line, under a kernel of one pixel."""
    line, grads = a.transpose(1, 2).unsqueeze(2), b.transpose(1, 2).unsqueeze(2)
    return ghost_conv(line, grads, _ONE, DIRECT if way == "direct" else GRAM)


def _unfolded(part: Convolution) -> Tensor:
    """Gram matrices of whole patches: cheaper than of pixels where patches hardly overlap."""
    t, d, p, *_ = sizes_of(part)
    groups = part.geometry.groups
    out = []
    for chunk in chunks(len(part.a), t * d * groups * part.a.element_size()):
        a = unfolded(part.a[chunk], part.geometry)
        b = part.b[chunk].reshape(-1, p, t).transpose(1, 2)
        out.append(_rows(a, b, "gram").view(-1, groups).sum(1))
    return torch.cat(out)
