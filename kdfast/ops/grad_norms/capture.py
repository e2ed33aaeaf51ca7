"""Recording of each layer's input and output gradient in one forward and one backward pass, without side effects.

Forward hooks see the inputs; hooks on the layers' outputs see the output gradients, layer by layer as the backward pass
reaches them. Gradients are requested only at the lowest layers, so no weight gradient is computed and the parameters'
``grad`` stays untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.graph import Node, count_parameter_uses, find_deepest_nodes, sort_topologically

__all__ = ["Call", "calls_in_graph", "has_batch_of_one", "record_calls", "run_backward", "used_outside_calls"]

Receive = Callable[["Call", Tensor], None]


@dataclass
class Call:
    """One call of a layer in the forward pass.

    Attributes:
        name: Name of the layer.
        layer: The layer.
        x: Its input; None after `take_input`.
        version: Version counter of the input at the call.
        shapes: Shapes of the input and the output.
        expanded: Whether the output had one row for all samples, which was then expanded to one row per sample.
        edge: Gradient edge of the output.
        receive: Called with the gradient of the output.
    """

    name: str
    layer: nn.Module
    x: Tensor | None
    version: int
    shapes: tuple[torch.Size, torch.Size]
    expanded: bool = False
    edge: Any = field(default=None, repr=False)
    receive: Receive | None = None

    @property
    def rows(self) -> int:
        """Length of the output's first dimension."""
        out = self.shapes[1]
        return out[0] if out else 0

    def take_input(self) -> Tensor:
        """Return the layer's input, one row per sample, and release the reference to it.

        Raises:
            UsageError: If the input was changed in place after the call.
        """
        x, self.x = self.x, None
        assert x is not None
        if x._version != self.version:
            raise UsageError(
                f"layer {self.name!r}: its input was changed in place after the call, so its gradient is lost; "
                "replace the in-place operation in the model's forward"
            )
        return x.expand(self.rows, *x.shape[1:]) if self.expanded else x


@contextmanager
def record_calls(layers: Mapping[str, nn.Module], expand: Collection[str] = (), n: int = 1) -> Iterator[list[Call]]:
    """Record the calls of some layers while the context is active.

    Args:
        layers: Layers by name.
        expand: Names of layers that compute one row for all samples, such as position embeddings (1, T, D). The row is
            expanded to one per sample, which separates the samples' contributions to the layer's gradient.
        n: Number of samples in the batch, for ``expand``.

    Raises (from the model's forward pass):
        UsageError: If a layer is called without a tensor, or with gradients disabled.
    """
    calls: list[Call] = []
    handles = []
    try:
        for name, layer in layers.items():
            hook = _recording_hook(name, calls, n if name in expand else 1)
            handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _recording_hook(name: str, calls: list[Call], rows: int) -> Callable[..., Tensor]:
    """Return a forward hook that appends to ``calls`` and expands an output of one row to ``rows``."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            raise UsageError(f"layer {name!r} must be called with one tensor, and return one")
        if not out.requires_grad:
            raise UsageError(
                f"layer {name!r} ran without gradients (torch.no_grad, or reentrant checkpointing) though it is "
                "trainable: freeze it with requires_grad_(False), or enable gradients"
            )
        expanded = rows > 1 and has_batch_of_one(x.shape, out.shape)
        if expanded:
            out = out.expand(rows, *out.shape[1:]).clone()
        if out._is_view():
            # A later in-place change would replace the history of a view, and with it this hook.
            out = torch.ops.aten._unsafe_view(out, out.shape)
        call = Call(name, layer, x.detach(), x._version, (x.shape, out.shape), expanded)
        call.edge = torch.autograd.graph.get_gradient_edge(out)
        out.register_hook(lambda grad: call.receive(call, grad) if call.receive else None)
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
    nodes = set(order)
    return [call for call in calls if call.edge.node in nodes], order


def used_outside_calls(
    order: Sequence[Node], calls: Sequence[Call], parameters: Mapping[str, nn.Parameter]
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
    """Run the backward pass and call ``receive(call, output gradient)`` for each call.

    Args:
        loss: Scalar, summed over the samples.
        order: ``sort_topologically`` of the loss.
        calls: Calls of interest, all in the graph.
        receive: Called with gradients disabled, in the order of the backward pass.
    """
    last = find_deepest_nodes(order, {call.edge.node for call in calls})
    edges = [call.edge for call in calls if call.edge.node in last]
    for call in calls:
        call.receive = receive
    if edges:
        torch.autograd.grad(loss, edges)
