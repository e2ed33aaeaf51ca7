"""Which layers' rows are not the batch's samples, also where there happen to be as many of both.

A layer that makes one row for all samples, of embedded positions say, can be scored when that row is repeated for each
sample; whether the model allows that is tried on a few of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import ShapeError
from kdfast.ops.grad_norms.capture import Call, captured, is_shared_row
from kdfast.ops.grad_norms.objective import Objective, run, some_samples, tensors_in

__all__ = ["Batch", "foreign_rows", "shared_rows"]


@dataclass(frozen=True)
class Batch:
    """A model and what it is run on.

    Attributes:
        model: As it is.
        inputs: As for ``grad_norms``.
        objective: The loss.
        layers: The layers that are recorded, by name.
        n: Samples.
    """

    model: nn.Module
    inputs: Any
    objective: Objective
    layers: Mapping[str, nn.Module]
    n: int

    def few(self) -> list[int]:
        """Some of the samples, by their numbers: more than one, and not as many as there are."""
        return [0, 1] if self.n > 2 else [0, 1, 0]

    def run_few(self, repeat: Collection[str], first_only: bool = False) -> tuple[list[Call], Any]:
        """The calls and the outputs of a run on a few samples; ``first_only`` splits no input but the first."""
        picked = self.few()
        inputs = some_samples(self.inputs, self.n, picked, first_only)
        devices = list({x.device for _, x in tensors_in(inputs) if x.is_cuda})
        with torch.random.fork_rng(devices), captured(self.layers, repeat, len(picked)) as calls:
            return calls, run(self.model, inputs)


def shared_rows(batch: Batch, calls: Sequence[Call]) -> set[str]:
    """Names of layers that make one row for all samples which may be repeated for each.

    That is tried on a few samples: their losses must stay what they are, and none of them have a gradient in the row
    that belongs to another.

    Args:
        batch: What is run.
        calls: Of the forward pass on all samples.
    """
    names = {call.name for call in calls if batch.n > 1 and is_shared_row(*call.shapes)}
    if not names:
        return names
    few = batch.few()
    objective = batch.objective.rows(few)
    try:
        expected = objective(batch.run_few(())[1])
        again, outputs = batch.run_few(names)
        losses = objective(outputs)
        same = torch.allclose(losses, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
        sound = same and not _mixing([call for call in again if call.repeated], losses)
    except Exception:  # whatever a model does with rows that it does not expect
        return set()
    return names if sound else set()


def foreign_rows(batch: Batch, calls: Sequence[Call], repeat: Collection[str]) -> set[str]:
    """Names of layers whose outputs do not hold one entry a sample: those of positions, say, or time-first ones.

    Where another length in the model equals that of the batch, a few samples are run once more: rows that are samples
    become fewer with them.

    Args:
        batch: What is run.
        calls: Of the forward pass on all samples.
        repeat: Layers whose one row is repeated.

    Raises:
        ShapeError: The model does not run on a few of the samples.
    """
    found = {call.name for call in calls if call.rows != batch.n}
    if batch.n > 1 and batch.n in _other_lengths(batch, calls):
        few = len(batch.few())
        found |= {call.name for call in _calls_on_few(batch, repeat) if call.rows != few}
    return found


def _calls_on_few(batch: Batch, repeat: Collection[str]) -> list[Call]:
    try:
        return batch.run_few(repeat)[0]
    except Exception:
        # An input that is no batch, such as a mask, may be as long as one.
        pass
    try:
        return batch.run_few(repeat, first_only=True)[0]
    except Exception as error:
        raise ShapeError(
            f"another dimension is as long as the batch, {batch.n}, and to tell which rows are samples the model was "
            f"run on a few of them, which failed ({error}): give a batch of another size"
        ) from error


def _other_lengths(batch: Batch, calls: Sequence[Call]) -> set[int]:
    """All lengths in sight that are not the batch's, though they may be equal to it by chance."""
    shapes = [x.shape[1:] for _, x in tensors_in(batch.inputs)]
    shapes += [shape[1:] for call in calls for shape in call.shapes]
    shapes += [held.shape for held in (*batch.model.parameters(), *batch.model.buffers())]
    return {length for shape in shapes for length in shape}


def _mixing(calls: Sequence[Call], losses: Tensor) -> list[Call]:
    """Calls in whose other rows the first or the last sample's loss has a gradient."""
    found = []
    for loss, others in ((losses[0], slice(1, None)), (losses[-1], slice(0, -1))):
        grads = torch.autograd.grad(loss, [call.edge for call in calls], retain_graph=True, allow_unused=True)
        found += [call for call, g in zip(calls, grads, strict=True) if g is not None and bool(g[others].any())]
    return found
