"""Formulas for operations on parameters.

A rule is a function of an operation with its output gradients that returns, for the positions of arguments, functions
that compute the gradient factors. ``RULES`` maps functions, or their names, to rules. An argument without a rule is
left to ``recompute``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.grad_norms.factors import Convolution, DenseGrad, Embedding, Geometry, GradFactors, OuterProduct
from kdfast.ops.grad_norms.operations.operation import Operation
from kdfast.ops.grad_norms.operations.recompute import recompute

__all__ = ["RULES", "factors_of"]

LazyFactors = Callable[[], GradFactors]
Rule = Callable[[Operation], Mapping[int, LazyFactors]]


def factors_of(operation: Operation, positions: Sequence[int]) -> dict[int, LazyFactors]:
    """Return functions that compute the gradient factors of some arguments, by position.

    Args:
        operation: The operation, with its output gradients.
        positions: Positions of the arguments among the leaves.
    """
    rule = RULES.get(operation.func) or RULES.get(operation.name)
    found = rule(operation) if rule and list(operation.grads) == [0] else {}
    return {at: found.get(at) or partial(recompute, operation, at) for at in positions}


def _grad(operation: Operation) -> tuple[Tensor, int]:
    """Return the output gradient of an operation with one output, and its sample axis."""
    axis = operation.output_axes[0]
    assert axis is not None
    return operation.grads[0], axis.dim


def _samples_first(operation: Operation, at: int) -> tuple[Tensor, Tensor] | None:
    """Return an argument and the output gradient with the samples first; None if their sample axes differ."""
    grad, axis = _grad(operation)
    if operation.axes[at] != operation.output_axes[0]:
        return None
    return operation.leaves[at].movedim(axis, 0), grad.movedim(axis, 0)


def _elementwise(operation: Operation) -> Mapping[int, LazyFactors]:
    """Formula of sums, differences, products and quotients of two arguments that are broadcast."""
    bound = operation.bind("left", "right")
    name = operation.name
    if len(operation.leaves) != 2 or len(bound) != 2:
        return {}  # such as alpha or rounding_mode
    a, b = (operation.leaves[at] for at in bound.values())
    if name in ("rsub", "rdiv", "rtruediv"):
        a, b = b, a
    slopes: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "add": (lambda g: g, lambda g: g),
        "sub": (lambda g: g, torch.neg),
        "mul": (lambda g: g * b, lambda g: g * a),
        "div": (lambda g: g / b, lambda g: -g * a / (b * b)),
    }
    kind = {"subtract": "sub", "multiply": "mul", "rsub": "sub", "divide": "div", "true_divide": "div"}.get(name, name)
    kind = "div" if kind in ("rdiv", "rtruediv", "truediv") else kind
    first, second = slopes[kind]
    found: dict[int, LazyFactors] = {}
    for at in bound.values():
        x = operation.leaves[at]
        if isinstance(x, Tensor) and operation.axes[at] is None:
            slope = first if x is a else second
            reduced = _broadcast_axes(operation, x.shape)
            if reduced is not None and a is not b:
                found[at] = partial(_reduce, operation, slope, x.shape, reduced)
    return found


def _broadcast_axes(operation: Operation, shape: torch.Size) -> list[int] | None:
    """Return the output's dimensions along which an argument is repeated, without the sample axis.

    None if the argument is not repeated along the sample axis.
    """
    grad, axis = _grad(operation)
    padded = (1,) * (grad.dim() - len(shape)) + tuple(shape)
    if padded[axis] != 1:
        return None
    return [i for i, (have, out) in enumerate(zip(padded, grad.shape, strict=True)) if have != out and i != axis]


def _reduce(
    operation: Operation, slope: Callable[[Tensor], Tensor], shape: torch.Size, repeated: list[int]
) -> DenseGrad:
    grad, axis = _grad(operation)
    terms = slope(grad)
    total = terms.sum(repeated, keepdim=True) if repeated else terms
    return DenseGrad(total.movedim(axis, 0).reshape(grad.shape[axis], *shape))


def _expand(operation: Operation) -> Mapping[int, LazyFactors]:
    """Formula of a parameter repeated for each sample by expand or broadcast_to."""
    shape = operation.leaves[0].shape
    repeated = _broadcast_axes(operation, shape)
    return {} if repeated is None else {0: partial(_reduce, operation, lambda g: g, shape, repeated)}


def _repeat(operation: Operation) -> Mapping[int, LazyFactors]:
    """Formula of a parameter repeated for each sample by repeat or tile."""
    grad, axis = _grad(operation)
    shape = operation.leaves[0].shape
    padded = (1,) * (grad.dim() - len(shape)) + tuple(shape)
    if padded[axis] != 1:
        return {}

    def factors() -> DenseGrad:
        blocks = [size for have, out in zip(padded, grad.shape, strict=True) for size in (out // have, have)]
        copies = [2 * i for i in range(grad.dim()) if i != axis]
        total = grad.reshape(blocks).sum(copies, keepdim=True)
        return DenseGrad(total.movedim(2 * axis, 0).reshape(grad.shape[axis], *shape))

    return {0: factors}


def _linear(operation: Operation) -> Mapping[int, LazyFactors]:
    bound = operation.bind("input", "weight", "bias")
    found: dict[int, LazyFactors] = {}
    pair = _samples_first(operation, bound["input"])
    if pair is not None and _grad(operation)[1] < pair[0].dim() - 1:
        a, b = (x.reshape(len(x), -1, x.shape[-1]) for x in pair)
        found = {bound["weight"]: lambda: OuterProduct(a, b)}
        if "bias" in bound:
            found[bound["bias"]] = lambda: DenseGrad(b.sum(1))
    return found


def _matmul(operation: Operation) -> Mapping[int, LazyFactors]:
    """Formula of products with a matrix on either side."""
    left, right = operation.bind("input", "other").values()
    x, w = operation.leaves[left], operation.leaves[right]
    if x.dim() < 2 or w.dim() < 2:
        return {}
    weight, at, sample = (w, right, left) if operation.axes[right] is None else (x, left, right)
    pair = _samples_first(operation, sample)
    dims = _grad(operation)[0].dim()
    matrix_axis = _grad(operation)[1] - dims  # -2 is a row of the left factor
    if pair is None or weight.dim() > 2 or matrix_axis == -1 or (weight is x and matrix_axis == -2):
        return {}
    a, b = pair
    if weight is x:  # (p, d) @ (N, ..., d, T)
        a, b = a.mT, b.mT
        return {at: lambda: OuterProduct(a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), -1, b.shape[-1]))}
    return {at: lambda: OuterProduct(b.reshape(len(b), -1, b.shape[-1]), a.reshape(len(a), -1, a.shape[-1]))}


def _addmm(operation: Operation) -> Mapping[int, LazyFactors]:
    bound = operation.bind("input", "mat1", "mat2")
    pair = _samples_first(operation, bound["mat1"])
    bias = operation.leaves[bound["input"]]
    if pair is None or operation.is_flat or _grad(operation)[1] != 0 or len(operation.leaves) != 3 or bias.dim() != 1:
        return {}
    x, grad = pair
    found: dict[int, LazyFactors] = {bound["mat2"]: lambda: OuterProduct(grad.unsqueeze(1), x.unsqueeze(1))}
    if bias.shape[0] == grad.shape[1]:
        found[bound["input"]] = lambda: DenseGrad(grad)
    return found


def _embedding(operation: Operation) -> Mapping[int, LazyFactors]:
    bound = operation.bind("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    pair = _samples_first(operation, bound["input"])
    values = {name: operation.leaves[at] for name, at in bound.items()}
    if pair is None or values.get("max_norm") is not None or values.get("scale_grad_by_freq"):
        return {}
    ids, grad = pair
    rows, padding = len(values["weight"]), values.get("padding_idx")
    skipped = None if padding is None else padding % rows
    n, width = len(ids), grad.shape[-1]
    return {bound["weight"]: lambda: Embedding(ids.reshape(n, -1).long(), grad.reshape(n, -1, width), rows, skipped)}


def _embedding_bag(operation: Operation) -> Mapping[int, LazyFactors]:
    """Formula of sums and means of rows, for bags given as rows of ids or by their offsets."""
    bound = operation.bind(
        "input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
        "per_sample_weights", "include_last_offset", "padding_idx",
    )  # fmt: skip
    values = {name: operation.leaves[at] for name, at in bound.items()}
    grad, axis = _grad(operation)
    mode, table = values.get("mode", "mean"), values["weight"]
    if (
        operation.is_flat
        or axis != 0
        or mode == "max"
        or values.get("max_norm") is not None
        or values.get("scale_grad_by_freq")
    ):
        return {}
    ids, scale = values["input"], values.get("per_sample_weights")
    scale = torch.ones_like(ids, dtype=grad.dtype) if scale is None else scale
    if ids.dim() == 1:
        ids, scale = _pad_bags(ids, scale, values["offsets"], len(grad))
    padding = values.get("padding_idx")
    if padding is not None:
        scale = scale * (ids != padding % len(table))
    if mode == "mean":
        counted = scale.count_nonzero(1).clamp_min(1).unsqueeze(1)
        scale = scale / counted
    return {bound["weight"]: lambda: Embedding(ids.long(), scale.unsqueeze(2) * grad.unsqueeze(1), len(table), None)}


def _pad_bags(ids: Tensor, scale: Tensor, offsets: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the ids of n bags and their weights as `(n, longest)`, with weight 0 beyond a bag's end."""
    starts = offsets[:n]
    ends = torch.cat([offsets, offsets.new_tensor([len(ids)])])[1 : n + 1]
    at = starts.unsqueeze(1) + torch.arange(max(1, int((ends - starts).max())), device=ids.device)
    inside = at < ends.unsqueeze(1)
    at = at.clamp_max(max(0, len(ids) - 1))
    return ids[at], scale[at] * inside


def _normalized(operation: Operation, normalize: Callable[[Tensor], Tensor], dims: int | None) -> dict[str, Any]:
    """Return the lazy factors of weight and bias of a normalization over the last ``dims``; None for per channel."""
    bound = operation.bind("input")
    pair = _samples_first(operation, bound["input"])
    axis = _grad(operation)[1]
    if pair is None or (axis != 0 or operation.is_flat if dims is None else axis >= pair[0].dim() - dims):
        return {}
    x, grad = pair
    if dims is None:
        shape: Sequence[int] = (*grad.shape[:2], -1)
        return {
            "weight": lambda: DenseGrad((normalize(x) * grad).reshape(shape).sum(2)),
            "bias": lambda: DenseGrad(grad.reshape(shape).sum(2)),
        }
    shape = (len(grad), -1, *grad.shape[grad.dim() - dims :])
    return {
        "weight": lambda: DenseGrad((normalize(x) * grad).reshape(shape).sum(1)),
        "bias": lambda: DenseGrad(grad.reshape(shape).sum(1)),
    }


def _by_position(bound: Mapping[str, int], factors: Mapping[str, LazyFactors]) -> dict[int, LazyFactors]:
    return {bound[name]: lazy for name, lazy in factors.items() if name in bound}


def _last_norm(operation: Operation) -> Mapping[int, LazyFactors]:
    """Formula of layer_norm and rms_norm."""
    args, kwargs = operation.arguments()
    given = {**dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)), **kwargs}
    names: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias")
    if operation.name == "rms_norm":
        given = {**dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)), **kwargs}
        names = ("input", "normalized_shape", "weight")
    shape = list(given["normalized_shape"])
    eps = given.get("eps", 1e-5 if operation.name == "layer_norm" else None)
    function: Callable[..., Tensor] = F.layer_norm if operation.name == "layer_norm" else F.rms_norm
    factors = _normalized(operation, lambda x: function(x, shape, eps=eps), len(shape))
    return _by_position(operation.bind(*names), factors)


def _group_norm(operation: Operation) -> Mapping[int, LazyFactors]:
    names = ("input", "num_groups", "weight", "bias", "eps")
    bound = operation.bind(*names)
    groups = operation.leaves[bound["num_groups"]]
    eps = operation.leaves[bound["eps"]] if "eps" in bound else 1e-5
    return _by_position(bound, _normalized(operation, lambda x: F.group_norm(x, groups, eps=eps), None))


def _running_norm(operation: Operation) -> Mapping[int, LazyFactors]:
    """Formula of batch_norm with running statistics, and of instance_norm."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "by_input", "momentum", "eps")
    bound = operation.bind(*names, "use_input_stats", "training")
    values = {name: operation.leaves[at] for name, at in bound.items()}
    instance = operation.func is F.instance_norm
    by_input = values.get("use_input_stats" if instance else "training", values.get("by_input", instance))
    eps = values.get("eps", 1e-5)
    if by_input and not instance:
        return {}
    if by_input:
        factors = _normalized(operation, lambda x: F.instance_norm(x, eps=eps), None)
    else:
        statistics = (values["running_mean"], values["running_var"])
        factors = _normalized(operation, lambda x: F.batch_norm(x, *statistics, eps=eps), None)
    return _by_position(bound, factors)


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def _convolution(operation: Operation) -> Mapping[int, LazyFactors]:
    """Formula of convolutions in one and two dimensions, plain and transposed."""
    transposed = "transpose" in operation.name
    names = _TRANSPOSED if transposed else _CONVOLUTION
    args, kwargs = operation.arguments()
    given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= {**dict(zip(names, args, strict=False)), **kwargs}
    bound = operation.bind(*names)
    dims = 1 if "1d" in operation.name else 2
    pair = _samples_first(operation, bound["input"])
    if pair is None or _grad(operation)[1] != 0 or pair[0].dim() != dims + 2:
        return {}
    geometry = _geometry(given, dims)
    x, grad = (v.unsqueeze(2) if dims == 1 else v for v in pair)
    a, b = (grad, x) if transposed else (x, grad)
    found: dict[int, LazyFactors] = {bound["weight"]: lambda: Convolution(a, b, geometry)}
    if "bias" in bound:
        found[bound["bias"]] = lambda: DenseGrad(grad.sum((2, 3)))
    return found


def _geometry(given: Mapping[str, Any], dims: int) -> Geometry:
    kernel = tuple(given["weight"].shape[2:])

    def sizes(value: Any, fill: int) -> tuple[int, int]:
        each = (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
        return (fill, each[0]) if dims == 1 else (each[0], each[1])

    dilation = sizes(given["dilation"], 1)
    if isinstance(given["padding"], str):
        totals = [d * (k - 1) for d, k in zip(dilation[2 - dims :], kernel, strict=True)]
        pads = [(t // 2, t - t // 2) if given["padding"] == "same" else (0, 0) for t in totals]
        pads = [(0, 0)] * (2 - dims) + pads
    else:
        pads = [(p, p) for p in sizes(given["padding"], 0)]
    return Geometry(sizes(kernel, 1), sizes(given["stride"], 1), dilation, (*pads[0], *pads[1]), int(given["groups"]))


RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(
        ("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "truediv", "rdiv",
         "rtruediv"), _elementwise,
    ),
    "expand": _expand,
    "expand_as": _expand,
    "broadcast_to": _expand,
    "repeat": _repeat,
    "tile": _repeat,
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    "layer_norm": _last_norm,
    "rms_norm": _last_norm,
    "group_norm": _group_norm,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv_transpose1d": _convolution,
    "conv_transpose2d": _convolution,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.batch_norm: _running_norm,
    F.instance_norm: _running_norm,
}  # fmt: skip
