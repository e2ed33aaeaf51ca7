"""Which layers' rows are not the batch's samples, also where there happen to be as many of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import ShapeError
from kdfast.ops.ghost_capture import Call, captured
from kdfast.ops.ghost_loss import Objective, joined, run, split, tensors_in

__all__ = ["batch_size", "foreign_rows"]


def batch_size(inputs: Any) -> int:
    """Samples in the batch, by the first tensor among the inputs; 1 where it has no dimensions."""
    _, first = next(tensors_in(inputs))
    return len(first) if first.dim() else 1


def foreign_rows(
    model: nn.Module,
    inputs: Any,
    objective: Objective,
    layers: Mapping[str, nn.Module],
    calls: Sequence[Call],
    n: int,
) -> set[str]:
    """Names of layers whose outputs do not hold one entry a sample: those of positions, say, or time-first ones.

    Where another length in the model equals `n`, or a row was repeated for every sample, a few samples are run once
    more: rows that are samples become fewer with them. The loss of one sample has no gradient in another's row; that is
    looked at where rows were repeated, since those always become fewer.

    Args:
        model: As it is.
        inputs: As for ``grad_norms``.
        objective: The loss.
        layers: The layers that are recorded, by name.
        calls: Of the forward pass on all samples.
        n: Samples in the batch.

    Raises:
        ShapeError: The model does not run on a few of the samples.
    """
    found = {call.name for call in calls if call.rows != n}
    if n > 1 and (n in _other_lengths(model, inputs, calls) or any(call.repeated for call in calls)):
        try:
            found |= _foreign_among_few(model, inputs, objective, layers, n, few=2 if n > 2 else 3)
        except Exception as error:
            raise ShapeError(
                f"another dimension is as long as the batch, {n}, or a layer has one row for all samples, and to tell "
                f"which rows are samples the model was run on a few of them, which failed ({error}): give a batch of "
                "another size, or use a fallback"
            ) from error
    return found


def _other_lengths(model: nn.Module, inputs: Any, calls: Sequence[Call]) -> set[int]:
    """All lengths in sight that are not the batch's, though they may be equal to it by chance."""
    shapes = [x.shape[1:] for _, x in tensors_in(inputs)]
    shapes += [shape[1:] for call in calls for shape in call.shapes]
    shapes += [held.shape for held in (*model.parameters(), *model.buffers())]
    return {length for shape in shapes for length in shape}


def _foreign_among_few(
    model: nn.Module, inputs: Any, objective: Objective, layers: Mapping[str, nn.Module], n: int, few: int
) -> set[str]:
    keys, batched = split(inputs, n)
    rows = torch.arange(few) % n
    picked = [x[rows.to(x.device)] for x in batched]
    devices = list({x.device for x in batched if x.is_cuda})
    with torch.random.fork_rng(devices), captured(layers, few) as calls:
        outputs = run(model, joined(inputs, keys, picked))
    found = {call.name for call in calls if call.rows != few}
    repeated = [call for call in calls if call.repeated]
    if repeated:
        found |= {call.name for call in _mixing(repeated, objective.rows(rows)(outputs))}
    return found


def _mixing(calls: Sequence[Call], losses: Tensor) -> list[Call]:
    """Calls in whose other rows the first or the last sample's loss has a gradient."""
    found = []
    for loss, others in ((losses[0], slice(1, None)), (losses[-1], slice(0, -1))):
        grads = torch.autograd.grad(loss, [call.edge for call in calls], retain_graph=True, allow_unused=True)
        found += [call for call, g in zip(calls, grads, strict=True) if g is not None and bool(g[others].any())]
    return found
