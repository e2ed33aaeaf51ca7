"""One operation of the forward pass: a function of PyTorch, its arguments, its outputs and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from kdfast.ops.grad_norms.operations.axes import SampleAxis

__all__ = ["Operation", "iter_tensors", "name_of"]


@dataclass(frozen=True)
class Operation:
    """A call of a function of PyTorch.

    Attributes:
        func: The function; for an operation in place, the one that does the same out of place.
        leaves: Its arguments, flattened and detached.
        spec: Their structure.
        axes: For each leaf, where the samples are; None if there are none.
        outputs: The detached outputs that have a gradient.
        output_axes: The same for them.
        output_positions: Their positions among all outputs.
        grads: Gradients of the outputs by position, in float32 or float64.
    """

    func: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    axes: Sequence[SampleAxis | None]
    outputs: Sequence[Tensor]
    output_axes: Sequence[SampleAxis | None]
    output_positions: Sequence[int]
    grads: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name."""
        return name_of(self.func)

    @property
    def is_flat(self) -> bool:
        """Whether samples are blocks of rows."""
        return any(axis is not None and axis.block > 1 for axis in (*self.axes, *self.output_axes))

    def with_grads(self, grads: Mapping[int, Tensor]) -> Operation:
        """Return the operation with its output gradients, and everything of a floating dtype in theirs.

        Blocks of rows get a dimension of their own, next to that of the samples.
        """
        wide = {i: g.float() if g.dtype in (torch.float16, torch.bfloat16) else g for i, g in grads.items()}
        dtype = next(iter(wide.values())).dtype
        cast: dict[int, Any] = {}  # one tensor given twice stays one tensor
        for x, axis in zip(self.leaves, self.axes, strict=True):
            if isinstance(x, Tensor) and id(x) not in cast:
                y = x.to(dtype) if x.is_floating_point() else x
                cast[id(x)] = y if axis is None else axis.split(y)
        return replace(
            self,
            leaves=[cast.get(id(x), x) for x in self.leaves],
            outputs=[
                x if axis is None else axis.split(x) for x, axis in zip(self.outputs, self.output_axes, strict=True)
            ],
            grads={i: g if (axis := self.output_axes[i]) is None else axis.split(g) for i, g in wide.items()},
        )

    def run(self, leaves: list[Any]) -> list[Tensor]:
        """Run the function on other leaves and return its outputs that have a gradient."""
        args, kwargs = tree_unflatten(leaves, self.spec)
        found = list(iter_tensors(self.func(*args, **kwargs)))
        return [found[i] for i in self.output_positions]

    def arguments(self) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the arguments by position and by name."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    def bind(self, *names: str) -> dict[str, int]:
        """Return the positions among the leaves of the arguments with these names, in the order of the signature.

        Arguments that are missing, or more than one leaf, are left out.
        """
        args, kwargs = tree_unflatten(range(len(self.leaves)), self.spec)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return {name: at for name, at in given.items() if isinstance(at, int)}


def name_of(func: Callable[..., Any]) -> str:
    """Return a function's name, without the name of an overload and the underscores of operators."""
    name = getattr(func, "__name__", "") or type(func).__name__
    if name == "__get__":  # of a property such as Tensor.T
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name.partition(".")[0].removeprefix("__").removesuffix("__")


def iter_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nested structure, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from iter_tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from iter_tensors(item)
