"""Layers whose per-sample gradients are known in factored form, with a formula for each.

A formula is a function of (layer, input, output gradient) that returns, for each parameter name, a function that
computes the gradient factors: frozen parameters cost nothing. ``LAYERS`` maps classes to formulas; ``REGISTERED`` holds
those of ``register_grad_norms``. A subclass or an instance uses the formula of its class unless it overrides
``forward``. Parameters of other layers are scored operation by operation (``kdfast.ops.grad_norms.operations``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.factors import Convolution, DenseGrad, Embedding, Geometry, GradFactors, OuterProduct

__all__ = [
    "LAYERS",
    "REGISTERED",
    "find_formula",
    "is_per_channel",
    "may_be_sample_axis",
    "register_grad_norms",
    "reject_unsuitable_layers",
    "trainable_parameters",
]

LazyFactors = dict[str, Callable[[], GradFactors]]
Formula = Callable[[Any, Tensor, Tensor], LazyFactors]

_FORWARD_METHODS = ("forward", "_conv_forward")


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's own trainable parameters by name, without those of its children."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


def parameters_outside(
    parameters: Mapping[str, nn.Parameter], layers: Mapping[str, nn.Module]
) -> dict[str, nn.Parameter]:
    """Return those of the parameters, by name, that are none of the layers' own."""
    inside = {id(p) for layer in layers.values() for p in trainable_parameters(layer).values()}
    return {name: p for name, p in parameters.items() if id(p) not in inside}


def find_formula(module: nn.Module) -> Formula | None:
    """Return the formula of a module; None if there is none or if the module overrides its class's computation."""
    for cls in type(module).__mro__:
        registered = REGISTERED.get(cls)
        formula = registered or LAYERS.get(cls) or LAYERS_BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
        if formula is not None:
            inherited = all(getattr(type(module), name, None) is getattr(cls, name, None) for name in _FORWARD_METHODS)
            inherited = inherited and not any(name in vars(module) for name in _FORWARD_METHODS)
            plain = set(dict(module.named_parameters(recurse=False))) <= {"weight", "bias"}
            return formula if inherited and (plain or registered) else None
    return None


def register_grad_norms(
    layer_class: type[nn.Module], fn: Callable[[Any, Tensor, Tensor], Mapping[str, Tensor | GradFactors]]
) -> None:
    """Tell ``grad_norms`` how to compute the per-sample gradients of a layer.

    Needed only for layers whose work PyTorch does not see, such as a custom ``autograd.Function``: other layers are
    scored by the operations that they run. Applies to the class and to subclasses that do not override ``forward``; a
    second registration replaces the first.

    Args:
        layer_class: A class of layers that take one tensor as first argument and return one tensor.
        fn: A function of (layer, x, grad), called with gradients disabled: the layer, its first argument and the
            gradient of the summed loss with respect to its output, both with the samples in the first dimension and in
            float32 or float64. Returns, for the name of each of the layer's own trainable parameters, the gradients
            `(N, *shape)` of all samples, or a factored form from ``kdfast.ops.grad_norms.factors`` such as
            `OuterProduct(a, b)`.

    Raises:
        UsageError: If the arguments are not a class of layers and a function.

    Example:
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.ones(()))
        ...     def forward(self, x):
        ...         return self.scale * x
        >>> kdfast.register_grad_norms(Scale, lambda layer, x, grad: {"scale": (x * grad).flatten(1).sum(1)})
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise UsageError(f"`layer_class` is {layer_class!r}: pass a subclass of torch.nn.Module")
    if not callable(fn):
        raise UsageError(f"`fn` is {fn!r}: pass a function (layer, x, grad) -> {{parameter name: gradients}}")
    REGISTERED[layer_class] = _checked(fn)


def _checked(fn: Callable[[Any, Tensor, Tensor], Mapping[str, Tensor | GradFactors]]) -> Formula:
    """Return the formula of a registered function, which checks what the function returns."""

    def formula(layer: nn.Module, x: Tensor, grad: Tensor) -> LazyFactors:
        found = fn(layer, x, grad)
        factors: LazyFactors = {}
        for name, p in trainable_parameters(layer).items():
            value = found.get(name)
            if isinstance(value, Tensor) and value.shape == (len(grad), *p.shape):
                value = DenseGrad(value)
            if not isinstance(value, get_args(GradFactors)):
                given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(
                    f"the function of register_grad_norms for {type(layer).__name__} returned {given} for {name!r}: it "
                    f"must return gradients of shape {(len(grad), *p.shape)}, or gradient factors"
                )
            factors[name] = partial(_same, value)
        return factors

    return formula


def _same(factors: GradFactors) -> GradFactors:
    return factors


def is_per_channel(layer: nn.Module) -> bool:
    """Return whether a layer's channels are the second dimension of its input."""
    return isinstance(layer, (_BatchNorm, nn.GroupNorm, _ConvNd))


def may_be_sample_axis(layer: nn.Module, axis: int, dims: int) -> bool:
    """Return whether a dimension of a layer's input, which has ``dims``, may count the samples."""
    if is_per_channel(layer):
        return axis == 0
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return axis < dims - len(layer.normalized_shape)
    return isinstance(layer, nn.Embedding) or axis < max(1, dims - 1)


def reject_unsuitable_layers(model: nn.Module) -> None:
    """Raise if a layer normalizes by statistics of the batch, or changes its weights when it is called.

    Raises:
        UsageError: If there is such a layer; the message names it.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise UsageError(
                f"layer {name!r} ({type(layer).__name__}) normalizes by statistics of the batch, so there is no "
                "per-sample gradient: call model.eval() first, or replace the layer by GroupNorm"
            )
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            raise UsageError(
                f"layer {name!r} ({type(layer).__name__}) rescales its weights when it is called: set its max_norm to "
                "None"
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
REGISTERED: dict[type[nn.Module], Formula] = {}
