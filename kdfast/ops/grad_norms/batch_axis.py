"""Detection of layers whose first dimension is not the batch, even if it happens to have the same length.

A layer that computes one row for all samples, such as position embeddings, can be scored once that row is expanded to
one per sample. A run on a few samples shows whether the model allows this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import ShapeError
from kdfast.ops.grad_norms.capture import Call, has_batch_of_one, record_calls
from kdfast.ops.grad_norms.objective import Objective, call_model, iter_tensors, select_samples

__all__ = ["Batch", "expandable_layers", "layers_without_batch_axis"]


@dataclass(frozen=True)
class Batch:
    """A model, its inputs and its loss.

    Attributes:
        model: The model.
        inputs: As for ``grad_norms``.
        objective: The loss.
        layers: Layers to record, by name.
        n: Number of samples.
    """

    model: nn.Module
    inputs: Any
    objective: Objective
    layers: Mapping[str, nn.Module]
    n: int

    @property
    def probe(self) -> list[int]:
        """Indices of a few samples: more than one, and a number that differs from ``n``."""
        return [0, 1] if self.n > 2 else [0, 1, 0]

    def run_probe(self, expand: Collection[str], first_only: bool = False) -> tuple[list[Call], Any]:
        """Run the model on the probe samples and return the calls and the outputs.

        Args:
            expand: Layers whose one row is expanded.
            first_only: Treat only the first input as batched.
        """
        inputs = select_samples(self.inputs, self.n, self.probe, first_only)
        devices = list({x.device for _, x in iter_tensors(inputs) if x.is_cuda})
        with torch.random.fork_rng(devices), record_calls(self.layers, expand, len(self.probe)) as calls:
            return calls, call_model(self.model, inputs)


def expandable_layers(batch: Batch, calls: Sequence[Call]) -> set[str]:
    """Return the names of layers that compute one row for all samples, if it may be expanded to one row per sample.

    The probe run decides: expanding must not change the losses, and no sample's loss may have a gradient in the row of
    another.

    Args:
        batch: The model and its inputs.
        calls: Calls recorded in the forward pass on all samples.
    """
    names = {call.name for call in calls if batch.n > 1 and has_batch_of_one(*call.shapes)}
    if not names:
        return names
    objective = batch.objective.select(batch.probe)
    try:
        expected = objective(batch.run_probe(())[1])
        probe_calls, outputs = batch.run_probe(names)
        losses = objective(outputs)
        same = torch.allclose(losses, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
        sound = same and not _calls_mixing_samples([call for call in probe_calls if call.expanded], losses)
    except Exception:  # a model may raise anything on rows that it does not expect
        return set()
    return names if sound else set()


def layers_without_batch_axis(batch: Batch, calls: Sequence[Call], expand: Collection[str]) -> set[str]:
    """Return the names of layers whose outputs do not have one row per sample, such as those of time-first tensors.

    If another dimension in the model is as long as the batch, the probe run distinguishes them: fewer samples give
    fewer rows only where rows are samples.

    Args:
        batch: The model and its inputs.
        calls: Calls recorded in the forward pass on all samples.
        expand: Layers whose one row is expanded.

    Raises:
        ShapeError: If the model does not run on the probe samples.
    """
    found = {call.name for call in calls if call.rows != batch.n}
    if batch.n > 1 and batch.n in _other_lengths(batch, calls):
        found |= {call.name for call in _probe_calls(batch, expand) if call.rows != len(batch.probe)}
    return found


def _probe_calls(batch: Batch, expand: Collection[str]) -> list[Call]:
    try:
        return batch.run_probe(expand)[0]
    except Exception:
        # An input without a batch dimension, such as a mask, may be as long as the batch.
        pass
    try:
        return batch.run_probe(expand, first_only=True)[0]
    except Exception as error:
        raise ShapeError(
            f"another dimension is as long as the batch, {batch.n}, and the run on a few samples that distinguishes "
            f"them failed ({error}): use a batch of another size"
        ) from error


def _other_lengths(batch: Batch, calls: Sequence[Call]) -> set[int]:
    """Return the lengths of all dimensions except the first of inputs and calls, and of parameters and buffers."""
    shapes = [x.shape[1:] for _, x in iter_tensors(batch.inputs)]
    shapes += [shape[1:] for call in calls for shape in call.shapes]
    shapes += [state.shape for state in (*batch.model.parameters(), *batch.model.buffers())]
    return {length for shape in shapes for length in shape}


def _calls_mixing_samples(calls: Sequence[Call], losses: Tensor) -> list[Call]:
    """Return the calls in which the first or the last sample's loss has a gradient in another sample's row."""
    found = []
    for loss, others in ((losses[0], slice(1, None)), (losses[-1], slice(0, -1))):
        grads = torch.autograd.grad(loss, [call.edge for call in calls], retain_graph=True, allow_unused=True)
        found += [call for call, g in zip(calls, grads, strict=True) if g is not None and bool(g[others].any())]
    return found
