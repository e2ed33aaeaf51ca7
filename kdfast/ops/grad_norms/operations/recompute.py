"""Per-sample gradients of an operation without a formula: it runs again on each sample, in parallel where possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.factors import Recomputed
from kdfast.ops.grad_norms.operations.axes import SampleAxis
from kdfast.ops.grad_norms.operations.operation import Operation

__all__ = ["NotSeparable", "recompute"]

_HALF = (torch.float16, torch.bfloat16)


class NotSeparable(UsageError):
    """An operation gives other results on single samples than on the batch."""


def recompute(operation: Operation, position: int) -> Recomputed:
    """Return the gradients of one argument of an operation.

    Args:
        operation: The operation, with its output gradients.
        position: The argument's position among the leaves.
    """
    target = operation.leaves[position]
    first, grad = next(iter(operation.grads.items()))
    axis = operation.output_axes[first]
    assert axis is not None
    return Recomputed(lambda chunk: _gradients(operation, position, chunk), grad.movedim(axis.dim, 0), target.shape)


def _gradients(operation: Operation, position: int, chunk: slice) -> Tensor:
    """Return the gradients `(n, *shape)` of some samples.

    Raises:
        NotSeparable: If the operation cannot run on single samples, or gives other results.
    """
    run = _PerSample(operation, position)
    samples = [_rows(x, axis, chunk) for x, axis in run.samples]
    grads = [_rows(g, axis, chunk) for g, axis in run.grads]
    try:
        try:
            # Kernels of recurrent layers keep what the backward pass needs only with gradients enabled, and other
            # attention kernels have no batching rule.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                found, outputs = vmap(run, (None, 0, 0))(operation.leaves[position], samples, grads)
        except RuntimeError:
            with torch.enable_grad():
                found, outputs = _loop(run, operation.leaves[position], samples, grads)
    except Exception as error:  # the operation may raise anything on a single sample
        raise NotSeparable(f"{operation.name} does not run on a single sample ({error})") from error
    for x, (expected, axis) in zip(outputs, run.outputs, strict=True):
        _check_equal(operation, x, _rows(expected, axis, chunk))
    return found.detach()


class _PerSample:
    """A function of (target, one sample's arguments, its output gradients) that returns gradient and outputs.

    Attributes:
        samples: The distinct arguments that contain samples, each with its sample axis.
        grads: The output gradients, with theirs.
        outputs: The recorded outputs, with theirs.
    """

    def __init__(self, operation: Operation, position: int) -> None:
        self._operation, self._position = operation, position
        distinct = {
            id(x): (x, axis)
            for x, axis in zip(operation.leaves, operation.axes, strict=True)
            if axis is not None and x is not operation.leaves[position]
        }
        self._keys = list(distinct)
        self.samples: list[tuple[Tensor, SampleAxis]] = list(distinct.values())
        self.grads = [(g, _required(operation.output_axes[i])) for i, g in operation.grads.items()]
        self.outputs = [(operation.outputs[i], axis) for i, (_, axis) in zip(operation.grads, self.grads, strict=True)]

    def __call__(self, target: Tensor, samples: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        operation = self._operation
        values = {
            key: x.unsqueeze(axis.dim) if axis.block == 1 else x
            for key, x, (_, axis) in zip(self._keys, samples, self.samples, strict=True)
        }

        def run(given: Tensor) -> tuple[Tensor, ...]:
            leaves = [values.get(id(x), x) for x in operation.leaves]
            leaves[self._position] = given
            outputs = operation.run(leaves)
            return tuple(
                (outputs[i].squeeze(axis.dim) if axis.block == 1 else outputs[i]).to(g.dtype)
                for i, (g, axis) in zip(operation.grads, self.grads, strict=True)
            )

        traced: Any = vjp(run, target)
        outputs, pull = traced
        return pull(tuple(grads))[0], outputs


def _loop(
    run: Callable[..., tuple[Tensor, tuple[Tensor, ...]]], target: Tensor, samples: list[Tensor], grads: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Do what ``vmap(run)`` does, one sample at a time."""
    found = [run(target, [x[i] for x in samples], [g[i] for g in grads]) for i in range(len(grads[0]))]
    outputs = tuple(torch.stack(rows) for rows in zip(*(out for _, out in found), strict=True))
    return torch.stack([gradient for gradient, _ in found]), outputs


def _rows(x: Tensor, axis: SampleAxis, chunk: slice) -> Tensor:
    """Return some samples, in the first dimension."""
    return x.movedim(axis.dim, 0)[chunk]


def _required(axis: SampleAxis | None) -> SampleAxis:
    assert axis is not None
    return axis


def _check_equal(operation: Operation, found: Tensor, expected: Tensor) -> None:
    """Raise unless single samples give the outputs that the batch gave.

    Raises:
        NotSeparable: If they differ.
    """
    half = expected.dtype in _HALF
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    rtol, atol = (0.1, 0.05) if half else (1e-3, 1e-4)
    if not torch.allclose(found.to(expected.dtype), expected, rtol=rtol, atol=atol * scale, equal_nan=True):
        raise NotSeparable(f"{operation.name} gives other results on a single sample than on the batch")
