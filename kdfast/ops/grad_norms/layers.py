"""Layers whose per-sample gradients are known in factored form, with a formula for each.

A formula is a function of (layer, input, output gradient) that returns, for each parameter name, a function that
computes the gradient factors: frozen parameters cost nothing. ``LAYERS`` maps classes to formulas. A subclass or an
instance uses the formula of its class unless it overrides ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.factors import Convolution, DenseGrad, Embedding, Geometry, GradFactors, OuterProduct

__all__ = ["LAYERS", "find_formula", "reject_batch_statistics", "trainable_parameters"]

LazyFactors = dict[str, Callable[[], GradFactors]]
Formula = Callable[[Any, Tensor, Tensor], LazyFactors]

_FORWARD_METHODS = ("forward", "_conv_forward")


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's own trainable parameters by name, without those of its children."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


def find_formula(module: nn.Module) -> Formula | None:
    """Return the formula of a module; None if there is none or if the module overrides its class's computation."""
    for cls in type(module).__mro__:
        formula = LAYERS.get(cls) or LAYERS_BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
        if formula is not None:
            inherited = all(getattr(type(module), name, None) is getattr(cls, name, None) for name in _FORWARD_METHODS)
            inherited = inherited and not any(name in vars(module) for name in _FORWARD_METHODS)
            plain = set(dict(module.named_parameters(recurse=False))) <= {"weight", "bias"}
            return formula if inherited and plain else None
    return None


def reject_batch_statistics(model: nn.Module) -> None:
    """Raise if a layer normalizes by statistics of the batch, so that there is no per-sample gradient.

    Raises:
        UsageError: If there is such a layer; the message names it.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise UsageError(
                f"layer {name!r} ({type(layer).__name__}) normalizes by statistics of the batch, so there is no "
                "per-sample gradient: call model.eval() first, or replace the layer by GroupNorm"
            )


def _flatten_positions(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten inputs and output gradients of a linear layer to (N, T, features)."""
    n = x.shape[0]
    return x.reshape(n, -1, x.shape[-1]), grad.reshape(n, -1, grad.shape[-1])


def _linear(layer: nn.Linear, x: Tensor, grad: Tensor) -> LazyFactors:
    a, b = _flatten_positions(x, grad)
    return {"weight": lambda: OuterProduct(a, b), "bias": lambda: DenseGrad(b.sum(1))}


def _transposed_linear(layer: nn.Module, x: Tensor, grad: Tensor) -> LazyFactors:
    """Formula of a linear layer whose weight has shape (inputs, outputs)."""
    a, b = _flatten_positions(x, grad)
    return {"weight": lambda: OuterProduct(b, a), "bias": lambda: DenseGrad(b.sum(1))}


def _embedding(layer: nn.Embedding, x: Tensor, grad: Tensor) -> LazyFactors:
    if layer.scale_grad_by_freq:
        raise UsageError("scale_grad_by_freq=True mixes the samples of a batch: set it to False")
    n = x.shape[0]
    b = grad.reshape(n, -1, grad.shape[-1])
    return {"weight": lambda: Embedding(x.reshape(n, -1), b, layer.num_embeddings, layer.padding_idx)}


def _convolution(layer: nn.Conv1d | nn.Conv2d, x: Tensor, grad: Tensor) -> LazyFactors:
    if x.dim() < len(layer.kernel_size) + 2:
        raise UsageError(f"the input has shape {tuple(x.shape)}, without a batch dimension: pass (N, channels, ...)")
    sides = _pads(layer)
    if layer.padding_mode != "zeros":
        x = F.pad(x, [s for pair in reversed(sides) for s in pair], layer.padding_mode)
        sides = [(0, 0)] * len(sides)
    sizes = [layer.kernel_size, layer.stride, layer.dilation]
    if isinstance(layer, nn.Conv1d):
        x, grad, sides = x.unsqueeze(2), grad.unsqueeze(2), [(0, 0), *sides]
        sizes = [(1, *v) for v in sizes]
    kernel, stride, dilation = ((v[0], v[1]) for v in sizes)
    geometry = Geometry(kernel, stride, dilation, (*sides[0], *sides[1]), layer.groups)
    return {"weight": lambda: Convolution(x, grad, geometry), "bias": lambda: DenseGrad(grad.sum((2, 3)))}


def _pads(layer: nn.Conv1d | nn.Conv2d) -> list[tuple[int, int]]:
    """Return the number of elements added before and after each spatial dimension."""
    if not isinstance(layer.padding, str):
        return [(p, p) for p in layer.padding]
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [(t // 2, t - t // 2) for t in totals]


def _batch_norm(layer: _BatchNorm, x: Tensor, grad: Tensor) -> LazyFactors:
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None
    assert variance is not None  # reject_batch_statistics has raised for a layer without statistics
    scale = torch.rsqrt(variance + layer.eps)
    return _per_channel(lambda: (x - mean.view(shape)) * scale.view(shape), grad)


def _group_norm(layer: nn.GroupNorm, x: Tensor, grad: Tensor) -> LazyFactors:
    return _per_channel(lambda: F.group_norm(x, layer.num_groups, eps=layer.eps), grad)


def _per_channel(normalized: Callable[[], Tensor], grad: Tensor) -> LazyFactors:
    n, c = grad.shape[:2]
    return {
        "weight": lambda: DenseGrad((normalized() * grad).reshape(n, c, -1).sum(2)),
        "bias": lambda: DenseGrad(grad.reshape(n, c, -1).sum(2)),
    }


def _layer_norm(layer: nn.LayerNorm, x: Tensor, grad: Tensor) -> LazyFactors:
    shape = layer.normalized_shape
    return _per_element(lambda: F.layer_norm(x, shape, eps=layer.eps), grad, len(shape))


def _rms_norm(layer: nn.RMSNorm, x: Tensor, grad: Tensor) -> LazyFactors:
    shape = list(layer.normalized_shape)
    return _per_element(lambda: F.rms_norm(x, shape, eps=layer.eps), grad, len(shape))


def _per_element(normalized: Callable[[], Tensor], grad: Tensor, dims: int) -> LazyFactors:
    shape = (grad.shape[0], -1, *grad.shape[grad.dim() - dims :])
    return {
        "weight": lambda: DenseGrad((normalized() * grad).reshape(shape).sum(1)),
        "bias": lambda: DenseGrad(grad.reshape(shape).sum(1)),
    }


LAYERS: Mapping[type[nn.Module], Formula] = {
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
# Layers of other libraries are listed by name, so that nothing is imported for them.
LAYERS_BY_NAME: Mapping[str, Formula] = {"transformers.pytorch_utils.Conv1D": _transposed_linear}
