"""Recording of each layer's input and output gradient in one forward and one backward pass, without side effects.

Forward hooks see the inputs; hooks on the layers' outputs see the output gradients, layer by layer as the backward pass
reaches them. Gradients are requested only at the lowest layers, so no weight gradient is computed and the parameters'
``grad`` stays untouched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import UsageError
from kdfast.ops._torch_compat import no_torch_function
from kdfast.ops.grad_norms.factors import GradFactors
from kdfast.ops.grad_norms.layers import find_formula, is_per_channel, may_be_sample_axis, trainable_parameters
from kdfast.ops.grad_norms.operations.axes import SampleAxis, axis_between
from kdfast.ops.grad_norms.operations.graph import (
    Edge,
    Node,
    count_parameter_uses,
    find_deepest_nodes,
    sort_topologically,
)

__all__ = [
    "Call",
    "LayerCall",
    "calls_in_graph",
    "calls_that_mix",
    "has_batch_of_one",
    "record_calls",
    "run_backward",
    "used_outside_calls",
]

Receive = Callable[["Call"], None]
LazyFactors = Callable[[], GradFactors]


@dataclass
class Call:
    """A call of a layer, or an operation on a parameter, in the forward pass.

    Attributes:
        name: Name of the layer or the parameter.
        edges: Gradient edge of each output.
        grads: Gradient of each output that has arrived.
        expected: Positions of the outputs that the loss depends on.
        receive: Called when all gradients have arrived.
    """

    name: str
    edges: list[Edge] = field(default_factory=list, repr=False)
    grads: dict[int, Tensor] = field(default_factory=dict, repr=False)
    expected: set[int] = field(default_factory=set)
    receive: Receive | None = None

    def watch(self, outputs: Sequence[Tensor]) -> None:
        """Receive the gradients of the outputs in the backward pass, while the call exists."""
        # The graph holds the hook, and the edges hold the graph: with a reference to the call, nothing of the pass
        # would be freed, since Python does not see cycles through the graph.
        call = weakref.ref(self)
        for i, out in enumerate(outputs):
            self.edges.append(torch.autograd.graph.get_gradient_edge(out))
            out.register_hook(partial(_pass_on, call, i))  # type: ignore[no-untyped-call]

    def arrive(self, position: int, grad: Tensor) -> None:
        """Take the gradient of an output."""
        if self.receive is not None and position in self.expected:
            self.grads[position] = grad
            if len(self.grads) == len(self.expected):
                self.receive(self)

    def outputs(self) -> list[tuple[Edge, SampleAxis | None]]:
        """Return the gradient edge and the sample axis of each output."""
        raise NotImplementedError

    def other_lengths(self) -> set[int]:
        """Return the lengths of the recorded dimensions that do not count samples."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters used, once for each of the ``contributions``."""
        raise NotImplementedError

    def contributions(self) -> Iterator[tuple[nn.Parameter, LazyFactors]]:
        """Yield what the call contributes to the gradients of its parameters, and release what it has recorded.

        Raises:
            UsageError: If the recorded values were changed in place, or the layer mixes samples.
        """
        raise NotImplementedError


def _pass_on(reference: weakref.ref[Call], position: int, grad: Tensor) -> None:
    call = reference()
    if call is not None:
        call.arrive(position, grad)


@dataclass
class LayerCall(Call):
    """One call of a layer that has a formula.

    Attributes:
        layer: The layer.
        x: Its input; None after `contributions`.
        version: Version counter of the input at the call.
        shapes: Shapes of the input and the output.
        axis: Where the samples are in both; None if they are not the rows.
        expanded: Whether the output had one row for all samples, which was then expanded to one row per sample.
    """

    layer: nn.Module = field(default_factory=nn.Identity)
    x: Tensor | None = field(default=None, repr=False)
    version: int = 0
    shapes: tuple[torch.Size, torch.Size] = (torch.Size(), torch.Size())
    axis: SampleAxis | None = None
    expanded: bool = False

    def find_axis(self, n: int) -> SampleAxis | None:
        """Return the first dimension of input and output that may count `n` samples."""
        x, out = self.shapes
        for dim in range(min(len(x), len(out))):
            if out[dim] == n and (x[dim] == n or self.expanded) and may_be_sample_axis(self.layer, dim, len(x)):
                return SampleAxis(dim)
        return None

    def find_axis_from(self, other: LayerCall, n: int, m: int) -> SampleAxis | None:
        """Return where the samples are, given the same call for `m` samples instead of `n`."""
        given, out = (axis_between(a, b, n, m) for a, b in zip(self.shapes, other.shapes, strict=True))
        axis = out if self.expanded or given == out else None
        if axis is None or not may_be_sample_axis(self.layer, axis.dim, len(self.shapes[0])):
            return None
        return axis if axis.block == 1 or not is_per_channel(self.layer) else None

    def outputs(self) -> list[tuple[Edge, SampleAxis | None]]:
        """Return the one output's."""
        return [(self.edges[0], self.axis)]

    def other_lengths(self) -> set[int]:
        """Return the lengths of the dimensions of input and output that do not count samples."""
        axis = None if self.axis is None else self.axis.dim
        return {x for shape in self.shapes for i, x in enumerate(shape) if i != axis}

    def parameters(self) -> list[nn.Parameter]:
        """Return the layer's own trainable parameters."""
        return list(trainable_parameters(self.layer).values())

    def contributions(self) -> Iterator[tuple[nn.Parameter, LazyFactors]]:
        """Apply the layer's formula."""
        x, grad = self._take_input(), self.grads.pop(0)
        formula = find_formula(self.layer)
        assert formula is not None
        assert self.axis is not None
        x, grad = self.axis.first(x), self.axis.first(grad)
        if grad.dtype in (torch.float16, torch.bfloat16):
            grad = grad.float()
        try:
            factors = formula(self.layer, x.to(grad.dtype) if x.is_floating_point() else x, grad)
        except UsageError as error:
            raise UsageError(f"layer {self.name!r}: {error}") from None
        for name, p in trainable_parameters(self.layer).items():
            yield p, factors[name]

    def _take_input(self) -> Tensor:
        """Return the layer's input, with one row per sample, and release the reference to it."""
        x, self.x = self.x, None
        assert x is not None
        if x._version != self.version:
            raise UsageError(
                f"layer {self.name!r}: its input was changed in place after the call, so its gradient is lost; "
                "replace the in-place operation in the model's forward"
            )
        return x.expand(self.shapes[1][0], *x.shape[1:]) if self.expanded else x


@contextmanager
def record_calls(layers: Mapping[str, nn.Module], n: int, expand: Collection[str] = ()) -> Iterator[list[LayerCall]]:
    """Record the calls of some layers while the context is active.

    Args:
        layers: Layers by name.
        n: Number of samples in the batch.
        expand: Names of layers that compute one row for all samples, such as position embeddings (1, T, D). The row is
            expanded to one per sample, which separates the samples' contributions to the layer's gradient.

    Raises (from the model's forward pass):
        UsageError: If a layer is called without a tensor, or with gradients disabled.
    """
    calls: list[LayerCall] = []
    handles = []
    try:
        for name, layer in layers.items():
            hook = _recording_hook(name, calls, n, name in expand)
            handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _recording_hook(name: str, calls: list[LayerCall], n: int, expand: bool) -> Callable[..., Tensor]:
    """Return a forward hook that appends to ``calls`` and may expand an output of one row to `n` rows."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            raise UsageError(f"layer {name!r} must be called with one tensor, and return one")
        if not out.requires_grad:
            raise UsageError(
                f"layer {name!r} ran without gradients (torch.no_grad, or reentrant checkpointing) though it is "
                "trainable: freeze it with requires_grad_(False), or enable gradients"
            )
        with no_torch_function():  # recording is no operation of the model
            expanded = expand and n > 1 and has_batch_of_one(x.shape, out.shape)
            if expanded:
                out = out.expand(n, *out.shape[1:]).clone()
            if out._is_view():
                # A later in-place change would replace the history of a view, and with it this hook.
                out = torch.ops.aten._unsafe_view(out, out.shape)
            call = LayerCall(
                name, layer=layer, x=x.detach(), version=x._version, shapes=(x.shape, out.shape), expanded=expanded
            )
            call.axis = call.find_axis(n)
            call.watch([out])
            calls.append(call)
        recorded: Tensor = out
        return recorded

    return hook


def has_batch_of_one(x: torch.Size, out: torch.Size) -> bool:
    """Return whether the shapes are those of a call on one row, of a single sample or shared by all samples."""
    return len(x) > 0 and len(out) > 1 and x[0] == out[0] == 1


def calls_in_graph(calls: Sequence[Call], loss: Tensor) -> tuple[list[Call], list[Node]]:
    """Return the calls that the loss depends on, and the ``sort_topologically`` of its graph."""
    order = sort_topologically(loss)
    used = {(child, i) for node in order for child, i in node.next_functions if child is not None}
    used.add((loss.grad_fn, loss.output_nr))
    for call in calls:
        call.expected = {i for i, edge in enumerate(call.edges) if (edge.node, edge.output_nr) in used}
    return [call for call in calls if call.expected], order


def calls_that_mix(calls: Sequence[Call], losses: Tensor, samples: Iterable[int] | None = None) -> list[Call]:
    """Return the calls where a sample's loss has a gradient in another sample's part of an output.

    Args:
        calls: The calls, all in the graph.
        losses: The losses `(n,)`.
        samples: The samples to look at, each in a backward pass; None: the first and the last.
    """
    outputs = [(call, edge, axis) for call in calls for edge, axis in call.outputs() if axis is not None]
    edges = [edge for _, edge, _ in outputs]
    mixed: dict[int, Call] = {}
    for i in {0, len(losses) - 1} if samples is None else samples:
        grads = torch.autograd.grad(losses[i], edges, retain_graph=True, allow_unused=True) if edges else ()
        for (call, _, axis), g in zip(outputs, grads, strict=True):
            if g is not None and (bool(axis.first(g)[:i].any()) or bool(axis.first(g)[i + 1 :].any())):
                mixed[id(call)] = call
    return list(mixed.values())


def used_outside_calls(
    order: Sequence[Node], calls: Sequence[LayerCall], parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    """Return the names of parameters that the loss also depends on outside the recorded calls.

    Args:
        order: ``sort_topologically`` of the loss.
        calls: All recorded calls in the graph.
        parameters: Candidate parameters by name.
    """
    uses = count_parameter_uses(order)
    recorded: dict[int, int] = {}
    for call in calls:
        for p in call.layer.parameters(recurse=False):
            recorded[id(p)] = recorded.get(id(p), 0) + 1
    return [name for name, p in parameters.items() if uses[id(p)] > recorded.get(id(p), 0)]


def run_backward(loss: Tensor, order: Sequence[Node], calls: Sequence[Call], receive: Receive) -> None:
    """Run the backward pass and call ``receive`` for each call once its output gradients have arrived.

    Args:
        loss: Scalar, summed over the samples.
        order: ``sort_topologically`` of the loss.
        calls: Calls of interest, all in the graph.
        receive: Called in the order of the backward pass.
    """
    last = find_deepest_nodes(order, {edge.node for call in calls for edge in call.edges})
    edges = [call.edges[i] for call in calls for i in sorted(call.expected) if call.edges[i].node in last]
    for call in calls:
        call.receive = receive
    if edges:
        torch.autograd.grad(loss, edges, allow_unused=True)
    for call in calls:
        if call.grads:  # an output without a gradient has left the call incomplete
            receive(call)
