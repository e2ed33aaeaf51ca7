"""The layers whose per-sample gradients are known in factors, and what a call of each one adds.

``LAYERS`` maps a layer's class to a function of (layer, input, output gradient) that returns, for each of its
parameters by name, a function that computes the part: frozen parameters cost nothing. A class derived from one of them
counts as it while it keeps its ``forward``, and so does a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.factors import Convolution, Geometry, Lookup, Part, Rows, Small

__all__ = ["LAYERS", "kind_of", "own_parameters", "refuse_batch_statistics"]

Parts = dict[str, Callable[[], Part]]
Layer = Callable[[Any, Tensor, Tensor], Parts]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters that the module holds itself, by their name in it."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


_COMPUTES = ("forward", "_conv_forward")


def kind_of(module: nn.Module) -> Layer | None:
    """The entry of ``LAYERS`` for a module, or None when there is none or the module is not used as its class says."""
    for cls in type(module).__mro__:
        layer = LAYERS.get(cls) or FOREIGN_LAYERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if layer is not None:
            same = all(getattr(type(module), name, None) is getattr(cls, name, None) for name in _COMPUTES)
            same = same and not any(name in vars(module) for name in _COMPUTES)
            plain = set(dict(module.named_parameters(recurse=False))) <= {"weight", "bias"}
            return layer if same and plain else None
    return None


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise for a normalisation that mixes the samples of a batch, so that a sample has no gradient of its own.

    Raises:
        UsageError: There is one; names it.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise UsageError(
                f"layer {name!r} ({type(layer).__name__}) normalises by statistics of the batch, so a sample has no "
                "gradient of its own: call model.eval() first, or replace it by GroupNorm"
            )


def _sequences(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of a linear layer as (N, T, features), whatever dimensions lie between."""
    n = x.shape[0]
    return x.reshape(n, -1, x.shape[-1]), grad.reshape(n, -1, grad.shape[-1])


def _linear(layer: nn.Linear, x: Tensor, grad: Tensor) -> Parts:
    a, b = _sequences(x, grad)
    return {"weight": lambda: Rows(a, b), "bias": lambda: Small(b.sum(1))}


def _transposed_linear(layer: nn.Module, x: Tensor, grad: Tensor) -> Parts:
    """A linear layer that holds its weight as (inputs, outputs)."""
    a, b = _sequences(x, grad)
    return {"weight": lambda: Rows(b, a), "bias": lambda: Small(b.sum(1))}


def _embedding(layer: nn.Embedding, x: Tensor, grad: Tensor) -> Parts:
    if layer.scale_grad_by_freq:
        raise UsageError("it has scale_grad_by_freq=True, which mixes the samples of a batch: set it to False")
    n = x.shape[0]
    b = grad.reshape(n, -1, grad.shape[-1])
    return {"weight": lambda: Lookup(x.reshape(n, -1), b, layer.num_embeddings, layer.padding_idx)}


def _convolution(layer: nn.Conv1d | nn.Conv2d, x: Tensor, grad: Tensor) -> Parts:
    if x.dim() < len(layer.kernel_size) + 2:
        raise UsageError(f"it was given {tuple(x.shape)}, one image without a batch: give (N, channels, ...)")
    sides = _pads(layer)
    if layer.padding_mode != "zeros":
        x = F.pad(x, [s for pair in reversed(sides) for s in pair], layer.padding_mode)
        sides = [(0, 0)] * len(sides)
    flat = [layer.kernel_size, layer.stride, layer.dilation]
    if isinstance(layer, nn.Conv1d):
        x, grad, sides = x.unsqueeze(2), grad.unsqueeze(2), [(0, 0), *sides]
        flat = [(1, *v) for v in flat]
    kernel, stride, dilation = ((v[0], v[1]) for v in flat)
    geometry = Geometry(kernel, stride, dilation, (*sides[0], *sides[1]), layer.groups)
    return {"weight": lambda: Convolution(x, grad, geometry), "bias": lambda: Small(grad.sum((2, 3)))}


def _pads(layer: nn.Conv1d | nn.Conv2d) -> list[tuple[int, int]]:
    """Elements added before and after each spatial dimension."""
    if not isinstance(layer.padding, str):
        return [(p, p) for p in layer.padding]
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [(t // 2, t - t // 2) for t in totals]


def _batch_norm(layer: _BatchNorm, x: Tensor, grad: Tensor) -> Parts:
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None
    assert variance is not None  # the capture refuses a layer without statistics
    scale = torch.rsqrt(variance + layer.eps)
    return _per_channel(lambda: (x - mean.view(shape)) * scale.view(shape), grad)


def _group_norm(layer: nn.GroupNorm, x: Tensor, grad: Tensor) -> Parts:
    return _per_channel(lambda: F.group_norm(x, layer.num_groups, eps=layer.eps), grad)


def _per_channel(normal: Callable[[], Tensor], grad: Tensor) -> Parts:
    n, c = grad.shape[:2]
    return {
        "weight": lambda: Small((normal() * grad).reshape(n, c, -1).sum(2)),
        "bias": lambda: Small(grad.reshape(n, c, -1).sum(2)),
    }


def _layer_norm(layer: nn.LayerNorm, x: Tensor, grad: Tensor) -> Parts:
    shape = layer.normalized_shape
    return _per_element(lambda: F.layer_norm(x, shape, eps=layer.eps), grad, len(shape))


def _rms_norm(layer: nn.RMSNorm, x: Tensor, grad: Tensor) -> Parts:
    shape = list(layer.normalized_shape)
    return _per_element(lambda: F.rms_norm(x, shape, eps=layer.eps), grad, len(shape))


def _per_element(normal: Callable[[], Tensor], grad: Tensor, dims: int) -> Parts:
    shape = (grad.shape[0], -1, *grad.shape[grad.dim() - dims :])
    return {
        "weight": lambda: Small((normal() * grad).reshape(shape).sum(1)),
        "bias": lambda: Small(grad.reshape(shape).sum(1)),
    }


LAYERS: Mapping[type[nn.Module], Layer] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.RMSNorm: _rms_norm,
}
# Layers of other libraries, by name: nothing is imported for them.
FOREIGN_LAYERS: Mapping[str, Layer] = {"transformers.pytorch_utils.Conv1D": _transposed_linear}
