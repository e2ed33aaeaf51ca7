"""Whether the samples stay apart, and in their order, at every recorded output.

What a layer receives in row i counts as sample i's. A model that sorts its samples, or normalizes them by each other,
breaks that without another shape, so a run on a few samples looks at the gradients. It is made once for each model and
loss: what happens to the samples is a property of their code.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping

import numpy as np
from torch import Tensor, nn

from kdfast.errors import ShapeError
from kdfast.ops.grad_norms.layers import parameters_outside
from kdfast.ops.grad_norms.recording.batch_axis import Batch, Run, agrees, few_samples
from kdfast.ops.grad_norms.recording.capture import Call, calls_that_mix

__all__ = ["mixed_parameters"]

_found: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, frozenset[str]]] = weakref.WeakKeyDictionary()
_SIZES = (8, 7, 9, 11, 13, 5)  # one of them is the length of no other dimension


def mixed_parameters(
    batch: Batch,
    run: Run,
    losses: Tensor,
    parameters: Mapping[str, nn.Parameter],
    layers: Mapping[str, nn.Module],
) -> frozenset[str]:
    """Return the names of parameters that are used on samples in another order than the inputs', or mixed.

    Nothing is found where the model does not run on a few samples, or its own loss does not.

    Args:
        batch: The batch, of two samples or more.
        run: The pass on all samples.
        losses: Its losses.
        parameters: All trainable parameters.
        layers: The recorded layers; the operations on all other parameters are recorded.
    """
    known = _found.setdefault(batch.model, {})
    loss = batch.objective.loss
    key = (batch.model.training, getattr(loss, "__code__", type(loss)), *parameters)
    if key not in known:
        traced = parameters_outside(parameters, layers)
        mixed = {id(p) for call in _mixed_calls(batch, run, losses, layers, traced) for p in call.parameters()}
        known[key] = frozenset(name for name, p in parameters.items() if id(p) in mixed)
    return known[key]


def _mixed_calls(
    batch: Batch, run: Run, losses: Tensor, layers: Mapping[str, nn.Module], traced: Mapping[str, nn.Parameter]
) -> list[Call]:
    """Return the calls that mix the samples, in a run on a few of them."""
    lengths = batch.other_lengths(run.calls)
    size = next((size for size in _SIZES if size not in lengths), None)
    if size is None:
        return []
    try:
        candidates = few_samples(batch, layers, traced, run.expanded, _out_of_order(batch.n, size))
    except ShapeError:
        return []
    few = next((candidate for candidate in candidates if agrees(batch, run, candidate, losses)), candidates[0])
    try:
        found = batch.objective.select(few.indices)(few.outputs)
    except Exception:  # the user's own loss may be defined for the whole batch alone
        return []
    if not isinstance(found, Tensor) or found.shape != (size,) or not found.requires_grad:
        return []
    return calls_that_mix(few.calls, found, range(size))


def _out_of_order(n: int, size: int) -> list[int]:
    """Return so many samples, some twice if there are fewer, neither ascending nor descending."""
    spread = np.linspace(0, n - 1, size).round().astype(int).tolist()
    return [spread[-1], spread[0], *reversed(spread[1:-1])]
