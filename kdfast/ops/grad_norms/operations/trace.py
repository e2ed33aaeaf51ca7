"""Recording of the operations on some parameters in the forward pass.

An operation whose result has one part per sample separates the samples' contributions to the parameter's gradient: it
is recorded, and the gradient of its result is received in the backward pass. A result without samples, such as
`1 + weight`, is followed instead, until it meets them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

from kdfast.errors import ShapeError, UsageError
from kdfast.ops.grad_norms.factors import Derived, GradFactors
from kdfast.ops.grad_norms.operations.axes import SampleAxis, axis_between, find_axis
from kdfast.ops.grad_norms.operations.graph import Edge, Node, bypassing_parameters
from kdfast.ops.grad_norms.operations.operation import Operation, iter_tensors, name_of
from kdfast.ops.grad_norms.operations.recompute import NotSeparable
from kdfast.ops.grad_norms.operations.rules import factors_of
from kdfast.ops.grad_norms.recording.capture import Call, LazyFactors

__all__ = ["Axes", "LoggedOperation", "OperationCall", "OperationTracer", "plan_between"]

# Take only the dtype, the device or the shape of another tensor.
_CONVERSIONS = ("to", "type_as", "view_as", "reshape_as")
# Repeat a tensor for each sample.
_REPEATING = ("expand", "expand_as", "broadcast_to", "repeat", "tile")
# Have a gradient that does not depend on the values of the arguments.
_WITHOUT_VALUES = ("add", "sub", *_REPEATING)
Axes = tuple[SampleAxis | None, ...]


@dataclass
class OperationCall(Call):
    """A recorded operation.

    Attributes:
        operation: The operation; None after `contributions`.
        versions: Version counters of its leaves at the call; None for those that may change later.
        values: For positions among the leaves, the parameter or the tensor computed from parameters alone.
        sources: For the same positions, the parameters.
    """

    operation: Operation | None = None
    versions: list[int | None] = field(default_factory=list, repr=False)
    values: dict[int, Tensor] = field(default_factory=dict, repr=False)
    sources: dict[int, list[nn.Parameter]] = field(default_factory=dict, repr=False)

    def outputs(self) -> list[tuple[Edge, SampleAxis | None]]:
        """Return the gradient edge and the sample axis of each output."""
        assert self.operation is not None
        return list(zip(self.edges, self.operation.output_axes, strict=True))

    def other_lengths(self) -> set[int]:
        """Return the lengths of the dimensions of arguments and outputs that do not count samples."""
        assert self.operation is not None
        pairs = [*zip(self.operation.leaves, self.operation.axes, strict=True)]
        pairs += zip(self.operation.outputs, self.operation.output_axes, strict=True)
        return {
            x for t, axis in pairs if isinstance(t, Tensor) for i, x in enumerate(t.shape) if not axis or i != axis.dim
        }

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all positions."""
        return [p for found in self.sources.values() for p in found]

    def contributions(self) -> Iterator[tuple[nn.Parameter, LazyFactors]]:
        """Apply the operation's rule."""
        operation, self.operation = self.operation, None
        assert operation is not None
        changed = any(
            isinstance(x, Tensor) and version is not None and x._version != version
            for x, version in zip(operation.leaves, self.versions, strict=True)
        )
        operation = operation.with_grads(self.grads)
        self.grads = {}
        factors = factors_of(operation, list(self.values))
        for position, value in self.values.items():
            lazy = factors[position]
            if changed and operation.name not in _WITHOUT_VALUES:
                lazy = partial(_raise_changed, operation.name)
            for p in self.sources[position]:
                yield p, lazy if value is p else partial(_derive, lazy, value, p)


def _version(x: object) -> int:
    return x._version if isinstance(x, Tensor) else 0


def _raise_changed(name: str) -> GradFactors:
    raise NotSeparable(
        f"an argument of {name} was changed in place after the call, so its gradient is lost; replace the in-place "
        "operation in the model's forward"
    )


def _derive(factors: LazyFactors, value: Tensor, p: nn.Parameter) -> Derived:
    found = factors()
    assert not isinstance(found, Derived)
    return Derived(found, value.shape, lambda grads: _pull(value, p, grads.to(value.dtype)).to(grads.dtype))


def _pull(value: Tensor, p: nn.Parameter, grads: Tensor) -> Tensor:
    """Multiply gradients `(n, *value.shape)` by the Jacobian of a tensor with respect to a parameter."""
    try:
        return torch.autograd.grad(value, p, grads, retain_graph=True, is_grads_batched=True)[0]
    except RuntimeError:  # a node without a batching rule
        return torch.stack([torch.autograd.grad(value, p, g, retain_graph=True)[0] for g in grads])


class LoggedOperation(NamedTuple):
    """What is known of every operation of a forward pass.

    Attributes:
        name: Name of the function.
        shapes: Shapes of its leaves that are tensors and of its outputs; None for other leaves.
        axes: What was taken for their sample axes, if the operation was on the parameters.
        followed: For the same operations, which leaves are the parameters, or computed from parameters alone.
    """

    name: str
    shapes: tuple[torch.Size | None, ...]
    axes: Axes | None = None
    followed: Sequence[bool] = ()

    def contradicts(self, plan: Axes) -> bool:
        """Return whether other sample axes were taken."""
        return self.axes is not None and self.axes != _without_followed(plan, self.followed)


class OperationTracer(TorchFunctionMode):
    """Records the operations on some parameters while it is active.

    Args:
        parameters: The parameters, by name.
        n: Number of samples.
        plan: The sample axes of every operation, from ``plan_between``; None to look for dimensions of length `n`.

    Attributes:
        calls: The recorded operations.
        log: All operations, in order.
        lost: Whether samples appeared where none were seen before: they may be the rows of a flattened dimension.

    Raises (from the model's forward pass):
        ShapeError: If the operations are not those of the plan.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], n: int, plan: Sequence[Axes] | None = None) -> None:
        super().__init__()
        self.calls: list[OperationCall] = []
        self.log: list[LoggedOperation] = []
        self.lost = False
        self._names = {id(p): name for name, p in parameters.items()}
        self._n, self._plan = n, plan
        self._sources: dict[int, list[nn.Parameter]] = {id(p): [p] for p in parameters.values()}
        self._alive: list[Tensor] = list(parameters.values())  # ids are unique among living tensors
        self._inputs: dict[Node, list[Node]] = {}
        self._without_gradients: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and record it if it is on one of the parameters."""
        kwargs = kwargs or {}
        given = list(iter_tensors((args, kwargs)))
        sources = [p for x in given for p in self._sources.get(id(x), ())]
        if sources and func is F.multi_head_attention_forward and torch.is_grad_enabled():
            with self:
                return _inside(func, self._n)(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        name = name_of(func)
        if sources and torch.is_grad_enabled():
            return self._run(func, name, args, kwargs, leaves, spec, sources)
        self._without_gradients |= {self._names[id(p)] for p in sources}
        shapes = [x.shape if isinstance(x, Tensor) else None for x in leaves]
        result = func(*args, **kwargs)
        self.log.append(LoggedOperation(name, (*shapes, *(x.shape for x in iter_tensors(result)))))
        return result

    def bypassing(self, loss: Tensor, order: Sequence[Node]) -> list[str]:
        """Return the names of parameters that the loss also depends on outside the recorded operations.

        Raises:
            UsageError: If operations ran inside a reentrant checkpoint, where they cannot be recorded.
        """
        if self._without_gradients and any(node.name() == "CheckpointFunctionBackward" for node in order):
            raise UsageError(
                f"parameter {min(self._without_gradients)!r} is used inside a reentrant checkpoint, without gradients: "
                "pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        found = bypassing_parameters(loss, self._inputs)
        return [name for key, name in self._names.items() if key in found]

    def _run(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        spec: TreeSpec,
        sources: list[nn.Parameter],
    ) -> Any:
        tensors = [x for x in leaves if isinstance(x, Tensor) and id(x) not in self._sources]
        nodes = [x.grad_fn for x in tensors if x.grad_fn is not None]
        in_place = _out_of_place(func, name)
        detached = _detach(leaves, copy_first=in_place is not None)
        shapes = [x.shape if isinstance(x, Tensor) else None for x in leaves]
        followed = [isinstance(x, Tensor) and id(x) in self._sources for x in leaves]
        before = [_version(x) for x in detached]
        result = func(*args, **kwargs)
        every = list(iter_tensors(result))
        axes = self._axes(name, (*shapes, *(x.shape for x in every)), followed)
        leaf_axes = axes[: len(leaves)]
        outputs = {i: x for i, x in enumerate(every) if x.requires_grad}
        output_axes = [axes[len(leaves) + i] for i in outputs]
        if all(axis is None for axis in output_axes):
            if name in _CONVERSIONS or all(axis is None for axis in leaf_axes):
                self._follow(outputs.values(), sources)
            return result
        if name.endswith("_") and in_place is None:
            return result  # ``bypassing`` finds its parameters
        if all(axis is None for axis in leaf_axes) and name not in _REPEATING:
            self.lost = True
        watched = list(outputs.values())
        if in_place is None:
            # One output may be computed from another, as h is from c in an LSTM cell: what flows between them inside
            # the operation must not be received as a gradient of the latter.
            replaced = {id(x): _as_new_node(x) if x._is_view() or len(watched) > 1 else x for x in watched}
            result = tree_map_only(Tensor, lambda x: replaced.get(id(x), x), result)
            watched = list(replaced.values())
        values = {i: leaves[i] for i, is_followed in enumerate(followed) if is_followed}
        call = OperationCall(
            self._names[id(sources[0])],
            operation=Operation(
                in_place or func, detached, spec, leaf_axes, [x.detach() for x in watched], output_axes, list(outputs)
            ),
            # Running statistics that instance_norm updates are not read, and its next call updates them again.
            versions=[
                None if func is F.instance_norm and _version(x) != version else _version(x)
                for x, version in zip(detached, before, strict=True)
            ],
            values=values,
            sources={i: self._sources[id(x)] for i, x in values.items()},
        )
        call.watch(watched)
        self.calls.append(call)
        self._inputs |= {edge.node: nodes for edge in call.edges}
        return result

    def _follow(self, outputs: Iterable[Tensor], sources: list[nn.Parameter]) -> None:
        """Treat results without samples like the parameters from which they were computed."""
        found = list({id(p): p for p in sources}.values())
        for x in outputs:
            if not any(x is p for p in found):
                self._sources[id(x)] = found
                self._alive.append(x)

    def _axes(self, name: str, shapes: tuple[torch.Size | None, ...], followed: list[bool]) -> Axes:
        """Return the sample axis of each leaf and output of an operation on the parameters, and log it."""
        if self._plan is None:
            axes = tuple(None if shape is None else find_axis(shape, self._n) for shape in shapes)
        elif len(self.log) < len(self._plan) and len(self._plan[len(self.log)]) == len(shapes):
            axes = self._plan[len(self.log)]
        else:
            raise ShapeError(
                f"the model does other operations in each run on the same {self._n} samples, so those of a parameter "
                "cannot be followed: pass fallback='loop'"
            )
        known = _without_followed(axes, followed)
        self.log.append(LoggedOperation(name, shapes, known, followed))
        return known


def _without_followed(axes: Axes, followed: Sequence[bool]) -> Axes:
    return tuple(None if i < len(followed) and followed[i] else axis for i, axis in enumerate(axes))


def plan_between(log: Sequence[LoggedOperation], other: Sequence[LoggedOperation], n: int, m: int) -> list[Axes] | None:
    """Return the sample axes of every operation, given the same forward pass for `n` and for `m` samples.

    None if the passes do not have the same operations.
    """
    if [(op.name, len(op.shapes)) for op in log] != [(op.name, len(op.shapes)) for op in other]:
        return None
    return [
        tuple(
            None if a is None or b is None else axis_between(a, b, n, m)
            for a, b in zip(op.shapes, few.shapes, strict=True)
        )
        for op, few in zip(log, other, strict=True)
    ]


def _detach(leaves: list[Any], copy_first: bool) -> list[Any]:
    """Detach the tensors; copy the first, which the operation is about to change, if asked to."""
    detached = {id(x): x.detach() for x in leaves if isinstance(x, Tensor)}
    if copy_first:
        detached[id(leaves[0])] = detached[id(leaves[0])].clone()
    return [detached.get(id(x), x) for x in leaves]


def _out_of_place(func: Callable[..., Any], name: str) -> Callable[..., Any] | None:
    """Return what does the same as an operation in place, but out of place; None if there is none."""
    if not name.endswith("_") or func is not getattr(Tensor, name, None):
        return None
    found: Callable[..., Any] | None = getattr(Tensor, name.removesuffix("_"), None)
    return found


def _as_new_node(x: Tensor) -> Tensor:
    """Return the tensor with a node of its own that is no view: an in-place change would replace a view's history."""
    found: Tensor = torch.ops.aten._unsafe_view(x, x.shape)
    return found


def _inside(func: Any, n: int) -> Callable[..., Any]:
    """Return ``F.multi_head_attention_forward`` as a function that runs its body instead of asking for overrides.

    Its last projection is of rows (time x samples, features), where the samples must be a dimension of their own.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dim() != 2 or len(x) % n:
            return F.linear(x, weight, bias)
        return F.linear(x.view(-1, n, x.shape[1]), weight, bias).flatten(0, 1)

    scope = {**func.__globals__, "has_torch_function": lambda tensors: False, "linear": linear}
    inner = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner
