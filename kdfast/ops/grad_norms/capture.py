"""One forward and one backward pass that hand each layer's input and output gradient over, and leave no trace.

Inputs are seen by forward hooks, output gradients by hooks on the layers' outputs, layer after layer as the backward
pass reaches them. Gradients are only asked for at the lowest layers, so no weight gradient is ever computed and the
parameters' ``grad`` is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.graph import Node, lowest, parameter_uses, walk

__all__ = ["Call", "backward", "captured", "in_graph", "is_shared_row", "stray"]

Receive = Callable[["Call", Tensor], None]


@dataclass
class Call:
    """One call of a layer in the forward pass.

    Attributes:
        name: Of the layer.
        layer: The layer.
        x: Its input, until it is taken.
        version: Of the input's contents, at the call.
        shapes: Of the input and the output.
        repeated: Whether the call made one row for all samples, which was then repeated for each.
        edge: Where the output's gradient is found.
        receive: Takes the output's gradient.
    """

    name: str
    layer: nn.Module
    x: Tensor | None
    version: int
    shapes: tuple[torch.Size, torch.Size]
    repeated: bool = False
    edge: Any = field(default=None, repr=False)
    receive: Receive | None = None

    @property
    def rows(self) -> int:
        """Length of the output's first dimension."""
        out = self.shapes[1]
        return out[0] if out else 0

    def take(self) -> Tensor:
        """The layer's input, a row a sample; it is not kept any longer."""
        x, self.x = self.x, None
        assert x is not None
        if x._version != self.version:
            raise UsageError(
                f"layer {self.name!r}: its input was changed in place after the call, so its gradient is lost; "
                "replace the in-place operation in the model's forward"
            )
        return x.expand(self.rows, *x.shape[1:]) if self.repeated else x


@contextmanager
def captured(layers: Mapping[str, nn.Module], repeat: Collection[str] = (), n: int = 1) -> Iterator[list[Call]]:
    """Record the calls of some layers while the context lasts.

    Args:
        layers: The layers by name.
        repeat: Names of layers that make one row for all samples, such as embedded positions (1, T, D). It is repeated
            for each sample, so that what a sample adds to its gradient can be told apart.
        n: Samples in the batch, for those.

    Raises (from the model's forward pass):
        UsageError: A layer is called without a tensor, or where gradients are off.
    """
    calls: list[Call] = []
    handles = []
    try:
        for name, layer in layers.items():
            hook = _recorder(name, calls, n if name in repeat else 1)
            handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _recorder(name: str, calls: list[Call], times: int) -> Callable[..., Tensor]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            raise UsageError(f"layer {name!r} must be called with one tensor, and return one")
        if not out.requires_grad:
            raise UsageError(
                f"layer {name!r} ran without gradients (torch.no_grad, or reentrant checkpointing) though it is "
                "trainable: freeze it with requires_grad_(False), or let gradients through"
            )
        repeated = times > 1 and is_shared_row(x.shape, out.shape)
        if repeated:
            out = out.expand(times, *out.shape[1:]).clone()
        if out._is_view():
            # Changed in place later, a view would get a new history that this hook does not stand in.
            out = torch.ops.aten._unsafe_view(out, out.shape)
        call = Call(name, layer, x.detach(), x._version, (x.shape, out.shape), repeated)
        call.edge = torch.autograd.graph.get_gradient_edge(out)
        out.register_hook(lambda grad: call.receive(call, grad) if call.receive else None)
        calls.append(call)
        kept: Tensor = out
        return kept

    return hook


def is_shared_row(x: torch.Size, out: torch.Size) -> bool:
    """Whether a call's shapes are those of one row: of a sample, or for all of them."""
    return len(x) > 0 and len(out) > 1 and x[0] == out[0] == 1


def in_graph(calls: Sequence[Call], loss: Tensor) -> tuple[list[Call], list[Node]]:
    """The calls that the loss depends on, and its graph, from ``walk``."""
    order = walk(loss)
    nodes = set(order)
    return [call for call in calls if call.edge.node in nodes], order


def stray(order: Sequence[Node], calls: Sequence[Call], parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that the loss depends on in other ways than through recorded calls.

    Args:
        order: The loss's graph, from ``walk``.
        calls: All that are in the graph.
        parameters: The ones to look at, by name.
    """
    uses = parameter_uses(order)
    known: dict[int, int] = {}
    for call in calls:
        for p in call.layer.parameters(recurse=False):
            known[id(p)] = known.get(id(p), 0) + 1
    return [name for name, p in parameters.items() if uses[id(p)] > known.get(id(p), 0)]


def backward(loss: Tensor, order: Sequence[Node], calls: Sequence[Call], receive: Receive) -> None:
    """Run the backward pass; ``receive(call, output gradient)`` for each call.

    Args:
        loss: Scalar, the sum over the samples.
        order: Its graph, from ``walk``.
        calls: Those of interest, all in the graph.
        receive: Called without gradients, in the order of the backward pass.
    """
    last = lowest(order, {call.edge.node for call in calls})
    edges = [call.edge for call in calls if call.edge.node in last]
    for call in calls:
        call.receive = receive
    if edges:
        torch.autograd.grad(loss, edges)
