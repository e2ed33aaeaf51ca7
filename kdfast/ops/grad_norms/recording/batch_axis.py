"""Recorded forward passes, and runs on a few samples that tell the samples from other dimensions of the same length.

A layer that computes one row for all samples, such as position embeddings, can be scored once that row is expanded to
one per sample. A run on a few samples shows whether the model allows this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import ShapeError
from kdfast.ops.grad_norms.objective import Objective
from kdfast.ops.grad_norms.operations.trace import Axes, OperationTracer
from kdfast.ops.grad_norms.recording.capture import Call, LayerCall, calls_that_mix, has_batch_of_one, record_calls
from kdfast.ops.model_inputs import batched_tensors, call_model, iter_tensors, select_samples, take_samples

__all__ = [
    "Batch",
    "RngSnapshot",
    "Run",
    "agrees",
    "check_samples_axis",
    "expandable_layers",
    "few_samples",
    "not_the_samples",
]


@dataclass(frozen=True)
class Run:
    """A recorded forward pass.

    Attributes:
        outputs: The model's outputs.
        layers: Recorded calls of layers.
        tracer: Recorded operations.
        indices: The samples that ran.
        deterministic: Whether no random numbers were drawn.
        expanded: Names of layers whose one row was expanded.
        first_only: Whether only the first input was taken as batched, in a run on a few samples.
    """

    outputs: Any
    layers: list[LayerCall]
    tracer: OperationTracer
    indices: list[int]
    deterministic: bool
    expanded: frozenset[str]
    first_only: bool = False

    @property
    def calls(self) -> list[Call]:
        """All recorded calls."""
        return [*self.layers, *self.tracer.calls]


@dataclass(frozen=True)
class Batch:
    """A model, its inputs and its loss.

    Attributes:
        model: The model.
        inputs: As for ``grad_norms``.
        objective: The loss.
        n: Number of samples.
        dim: The dimension of the inputs that counts them.
    """

    model: nn.Module
    inputs: Any
    objective: Objective
    n: int
    dim: int

    def run(
        self,
        layers: Mapping[str, nn.Module],
        traced: Mapping[str, nn.Parameter],
        expand: Collection[str] = (),
        plan: Sequence[Axes] | None = None,
    ) -> Run:
        """Run the model.

        Args:
            layers: Layers whose calls are recorded.
            traced: Parameters whose operations are recorded.
            expand: Layers whose one row is expanded.
            plan: As for ``OperationTracer``.
        """
        return self._run(self.inputs, list(range(self.n)), layers, traced, expand, plan)

    def run_few(
        self,
        layers: Mapping[str, nn.Module],
        traced: Mapping[str, nn.Parameter],
        expand: Collection[str],
        first_only: bool = False,
        plan: Sequence[Axes] | None = None,
        indices: list[int] | None = None,
    ) -> Run:
        """Run the model on a few samples, without advancing the random number generators.

        Args:
            layers: As for ``run``.
            traced: As for ``run``.
            expand: As for ``run``.
            first_only: Treat only the first input as batched.
            plan: As for ``run``.
            indices: Which samples; None: two, or three for a batch of two.
        """
        if indices is None:
            indices = [0, 1] if self.n > 2 else [0, 1, 0]
        inputs = select_samples(self.inputs, self.n, indices, self.dim, first_only)
        devices = list({x.device for _, x in iter_tensors(inputs) if x.is_cuda})
        with torch.random.fork_rng(devices):
            run = self._run(inputs, indices, layers, traced, expand, plan)
        return replace(run, first_only=first_only)

    def same_losses(self, found: Tensor, expected: Tensor, scale: Tensor) -> bool:
        """Return whether losses of one or several samples are equal up to rounding, for losses of some scale."""
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        kind = expected.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        tolerance = 0.2 if half or autocast else 0.01
        return bool(((found.detach() - expected.detach()).abs() <= tolerance * scale).all())

    def other_lengths(self, calls: Sequence[Call] = ()) -> set[int]:
        """Return the lengths of all dimensions that do not count samples: of inputs, calls, parameters and buffers."""
        states = (*self.model.parameters(), *self.model.buffers())
        lengths = self.other_input_lengths() | {length for state in states for length in state.shape}
        return lengths.union(*(call.other_lengths() for call in calls))

    def other_input_lengths(self) -> set[int]:
        """Return the lengths of the dimensions of inputs that do not count samples."""
        return {length for _, x in iter_tensors(self.inputs) for i, length in enumerate(x.shape) if i != self.dim}

    def _run(
        self,
        inputs: Any,
        indices: list[int],
        layers: Mapping[str, nn.Module],
        traced: Mapping[str, nn.Parameter],
        expand: Collection[str],
        plan: Sequence[Axes] | None,
    ) -> Run:
        n = len(indices)
        rng = RngSnapshot(next(self.model.parameters()).device)
        with record_calls(layers, n, expand) as calls:
            tracer = OperationTracer(traced, n, plan)
            if traced:
                with tracer:
                    outputs = call_model(self.model, inputs)
            else:
                outputs = call_model(self.model, inputs)
        return Run(outputs, calls, tracer, indices, not rng.changed(), frozenset(expand))


class RngSnapshot:
    """State of a device's random number generator at construction."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._state = self._current()

    def changed(self) -> bool:
        """Return whether random numbers were drawn since."""
        return not torch.equal(self._state, self._current())

    def restore(self) -> None:
        """Reset the generator to the snapshot."""
        if self._cuda is None:
            torch.set_rng_state(self._state)
        else:
            torch.cuda.set_rng_state(self._state, self._cuda)

    def _current(self) -> Tensor:
        return torch.get_rng_state() if self._cuda is None else torch.cuda.get_rng_state(self._cuda)


def expandable_layers(batch: Batch, layers: Mapping[str, nn.Module], calls: Sequence[LayerCall]) -> set[str]:
    """Return the names of layers that compute one row for all samples, if it may be expanded to one row per sample.

    A run on a few samples decides: expanding must not change the losses, and no sample's loss may have a gradient in
    the row of another.

    Args:
        batch: The model and its inputs.
        layers: The recorded layers.
        calls: Calls recorded in the forward pass on all samples.
    """
    names = {call.name for call in calls if batch.n > 1 and has_batch_of_one(*call.shapes)}
    if not names:
        return names
    try:
        plain = batch.run_few(layers, {}, ())
        objective = batch.objective.select(plain.indices)
        expected = objective(plain.outputs)
        expanded = batch.run_few(layers, {}, names)
        losses = objective(expanded.outputs)
        same = torch.allclose(losses, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
        sound = same and not calls_that_mix([call for call in expanded.layers if call.expanded], losses)
    except Exception:  # a model may raise anything on rows that it does not expect
        return set()
    return names if sound else set()


def few_samples(
    batch: Batch,
    layers: Mapping[str, nn.Module],
    traced: Mapping[str, nn.Parameter],
    expand: Collection[str],
    indices: list[int] | None = None,
) -> list[Run]:
    """Return runs on a few samples, all inputs split or the first alone, for a batch as long as another dimension.

    Raises:
        ShapeError: If the model does not run on a few samples.
    """
    runs: list[Run] = []
    several = len(batched_tensors(batch.inputs, batch.n, batch.dim)[0]) > 1
    error: Exception | None = None
    for first_only in (False, True) if several else (False,):
        try:
            runs.append(batch.run_few(layers, traced, expand, first_only, indices=indices))
        except Exception as caught:  # an input without a batch dimension, such as a mask, may be as long as the batch
            error = caught
    if not runs:
        raise ShapeError(
            f"another dimension is as long as the batch, {batch.n}, and the run on a few samples that distinguishes "
            f"them failed ({error}): use a batch of another size"
        ) from error
    return runs


def check_samples_axis(batch: Batch, run: Run, few: Sequence[Run], losses: Tensor) -> Run:
    """Return the run on a few samples that agrees with the run on all of them.

    Args:
        batch: The model and its inputs.
        run: The run on all samples.
        few: Runs on a few.
        losses: The losses of all samples.

    Raises:
        ShapeError: If none agrees: the samples are not where they are expected.
    """
    for candidate in few:
        if agrees(batch, run, candidate, losses):
            return candidate
    raise not_the_samples(batch)


def not_the_samples(batch: Batch) -> ShapeError:
    """Return the error for samples that depend on each other."""
    return ShapeError(
        f"several dimensions have length {batch.n}, the number of samples, and the loss of a sample depends on more "
        f"than its part of dimension {batch.dim} of the inputs: pass the samples' dimension as `batch_dim`, or a batch "
        "of another size; a model that mixes the samples has no gradient per sample"
    )


def agrees(batch: Batch, run: Run, few: Run, losses: Tensor) -> bool:
    """Return whether a run on a few samples has the losses of the run on all of them, as far as that can be told."""
    if batch.objective.is_linear:
        expected = take_samples(losses, few.indices)
        try:
            found = batch.objective.select(few.indices)(few.outputs)
        except RuntimeError:  # the outputs are not those of as many samples
            return False
        if found.shape != expected.shape:
            return False
        if not (run.deterministic and few.deterministic):
            return True
        return batch.same_losses(found, expected, losses.detach().abs().max())
    return True
