"""The forward pass that grad_norms records: which layers, which operations, and where their samples are.

A pass is repeated, with the same random numbers, until every layer's formula applies: the parameters of layers whose
rows are not samples, or whose weights are also used elsewhere, are followed operation by operation instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from kdfast.errors import ShapeError
from kdfast.ops.grad_norms.layers import find_formula, parameters_outside, trainable_parameters
from kdfast.ops.grad_norms.operations.axes import SampleAxis
from kdfast.ops.grad_norms.operations.graph import Node
from kdfast.ops.grad_norms.operations.trace import Axes, LoggedOperation, plan_between
from kdfast.ops.grad_norms.recording.batch_axis import (
    Batch,
    RngSnapshot,
    Run,
    check_samples_axis,
    expandable_layers,
    few_samples,
    not_the_samples,
)
from kdfast.ops.grad_norms.recording.capture import Call, LayerCall, calls_in_graph, calls_that_mix, used_outside_calls
from kdfast.ops.grad_norms.recording.separation import mixed_parameters

__all__ = ["Forward", "record_forward"]

Parameters = dict[str, nn.Parameter]


@dataclass
class Forward:
    """A recorded forward pass and its loss.

    Attributes:
        batch: The batch, with the linearized loss.
        scales: Norms `(N,)` of the gradients at the logits that divided the loss; None if nothing did.
        losses: The linearized losses `(N,)`.
        calls: Recorded calls that the loss depends on.
        order: ``sort_topologically`` of the loss.
        run: The pass.
    """

    batch: Batch
    scales: Tensor | None
    losses: Tensor
    calls: list[Call]
    order: list[Node]
    run: Run


def record_forward(batch: Batch, parameters: Parameters) -> tuple[Forward, dict[str, str]]:
    """Run the forward pass; run it again with the same random numbers if layers must be treated differently.

    Returns:
        The pass, and the parameters that it does not cover, with the reasons.
    """
    layers = {name: layer for name, layer in batch.model.named_modules() if trainable_parameters(layer)}
    layers = {name: layer for name, layer in layers.items() if find_formula(layer) is not None}
    rng = RngSnapshot(next(iter(parameters.values())).device)
    forward = _forward(batch, parameters, layers)
    if batch.n == 1:
        return forward, dict.fromkeys(_not_by_formula(forward, parameters, layers), "")
    batch, scales = forward.batch, forward.scales
    expand = expandable_layers(batch, layers, forward.run.layers)
    while True:
        axes = _find_axes(forward, parameters, layers, expand)
        if axes is not None:
            axes.adopt(forward.run)
        unfit = _unfit_layers(forward, parameters, layers) - (expand - forward.run.expanded)
        if not unfit and expand <= forward.run.expanded:
            break
        layers = {name: layer for name, layer in layers.items() if name not in unfit}
        del forward, axes  # frees the graph
        rng.restore()
        forward = _again(batch, scales, parameters, layers, expand)
    if axes is not None and axes.contradict(forward.run):
        del forward
        rng.restore()
        forward = _again(batch, scales, parameters, layers, expand, axes.operations)
        axes.adopt(forward.run)
    own_loss = not batch.objective.is_linear and batch.n in batch.other_input_lengths()
    # A loss of the user's own may be valid for the whole batch alone, so the run on a few samples cannot tell.
    if axes is not None and axes.ambiguous and own_loss and calls_that_mix(forward.calls, forward.losses):
        raise not_the_samples(batch)
    reason = "is used by an operation that mixes samples, or that PyTorch does not show (a custom autograd.Function)"
    uncovered = dict.fromkeys(forward.run.tracer.bypassing(forward.losses, forward.order), reason)
    if axes is not None and axes.ambiguous and axes.operations is None:
        reason = f"enters other operations on a few samples, and another dimension is as long as the batch, {batch.n}"
        uncovered |= dict.fromkeys(parameters_outside(parameters, layers), reason)
    if axes is not None and axes.blocks(forward.run):
        uncovered |= _mixed_blocks(forward, parameters, layers, axes)
    mixed = mixed_parameters(forward.batch, forward.run, forward.losses, parameters, layers)
    reason = "is used on samples in another order than that of the inputs, or on a mixture of them"
    return forward, dict.fromkeys(mixed, reason) | uncovered


def _forward(batch: Batch, parameters: Parameters, layers: dict[str, nn.Module]) -> Forward:
    """Run and record the first forward pass, and linearize the loss.

    Raises:
        ShapeError: If there is another number of losses than of samples.
    """
    run = batch.run(layers, {} if batch.n == 1 else parameters_outside(parameters, layers))
    losses = batch.objective.checked_losses(run.outputs)
    if len(losses) != batch.n:
        raise ShapeError(
            f"there are {len(losses)} losses for {batch.n} samples in dimension {batch.dim} of the inputs: pass the "
            "samples' dimension as `batch_dim`"
        )
    objective, scales = batch.objective.linearize(run.outputs)
    return _recorded(replace(batch, objective=objective), scales, run)


def _again(
    batch: Batch,
    scales: Tensor | None,
    parameters: Parameters,
    layers: dict[str, nn.Module],
    expand: Collection[str],
    plan: Sequence[Axes] | None = None,
) -> Forward:
    """Run and record a forward pass for a linearized loss; arguments as for ``Forward`` and ``Batch.run``."""
    return _recorded(batch, scales, batch.run(layers, parameters_outside(parameters, layers), expand, plan))


def _recorded(batch: Batch, scales: Tensor | None, run: Run) -> Forward:
    losses = batch.objective(run.outputs)
    calls, order = calls_in_graph(run.calls, losses)
    return Forward(batch, scales, losses, calls, order, run)


@dataclass(frozen=True)
class _SampleAxes:
    """Where the samples are, found by a run on a few of them.

    Attributes:
        few: That run.
        layers: For each call of a layer, in order.
        operations: For each operation, in order; None if nothing is known.
        ambiguous: Whether another dimension is as long as the batch.
    """

    few: Run
    layers: list[SampleAxis | None]
    operations: list[Axes] | None
    ambiguous: bool

    def adopt(self, run: Run) -> None:
        """Take over the axes of layers."""
        for call, axis in zip(run.layers, self.layers, strict=True):
            call.axis = axis

    def contradict(self, run: Run) -> bool:
        """Return whether operations were recorded with other axes."""
        log = run.tracer.log
        return self.operations is not None and any(map(LoggedOperation.contradicts, log, self.operations))

    def blocks(self, run: Run) -> list[Call]:
        """Return the calls in which a sample is a block of rows."""
        return [call for call in run.calls if any(axis and axis.block > 1 for _, axis in call.outputs())]


def _find_axes(
    forward: Forward, parameters: Parameters, layers: dict[str, nn.Module], expand: Collection[str]
) -> _SampleAxes | None:
    """Find the sample axes by a run on a few samples, where shapes do not tell.

    Args:
        forward: The pass on all samples.
        parameters: All trainable parameters.
        layers: The recorded layers.
        expand: Layers whose one row is to be expanded.

    Raises:
        ShapeError: If the samples are not where they are expected.
    """
    batch, run = forward.batch, forward.run
    ambiguous = batch.n in batch.other_lengths(run.calls)
    unknown = [c for c in forward.calls if isinstance(c, LayerCall) and c.axis is None and c.name not in expand]
    if not (ambiguous or unknown or run.tracer.lost):
        return None
    try:
        few = few_samples(batch, layers, parameters_outside(parameters, layers), run.expanded)
        found = check_samples_axis(batch, run, few, forward.losses)
        if [call.name for call in found.layers] != [call.name for call in run.layers]:
            raise ShapeError(
                f"another dimension is as long as the batch, {batch.n}, and the model calls other layers on a few "
                "samples: use a batch of another size"
            )
    except ShapeError:
        if ambiguous:
            raise
        return None
    m = len(found.indices)
    axes = [call.find_axis_from(other, batch.n, m) for call, other in zip(run.layers, found.layers, strict=True)]
    return _SampleAxes(found, axes, plan_between(run.tracer.log, found.tracer.log, batch.n, m), ambiguous)


def _mixed_blocks(
    forward: Forward, parameters: Parameters, layers: dict[str, nn.Module], axes: _SampleAxes
) -> dict[str, str]:
    """Return the parameters used on blocks of rows, with the reason, if the rows of a block are of several samples."""
    batch, run = forward.batch, forward.run
    if batch.objective.is_linear:
        traced = parameters_outside(parameters, layers)
        few = batch.run_few(layers, traced, run.expanded, axes.few.first_only, axes.operations)
        axes.adopt(few)
        mixed = calls_that_mix(few.calls, batch.objective.select(few.indices)(few.outputs))
    else:
        mixed = calls_that_mix(run.calls, forward.losses)
    if not mixed:
        return {}
    used = {id(p) for call in axes.blocks(run) for p in call.parameters()}
    reason = "is used on a dimension that holds samples and something else, and the samples are not the outer part"
    return {name: reason for name, p in parameters.items() if id(p) in used}


def _unfit_layers(forward: Forward, parameters: Parameters, layers: dict[str, nn.Module]) -> set[str]:
    """Return the names of layers whose formula does not apply: rows are no samples, or weights are used elsewhere."""
    in_graph = [call for call in forward.calls if isinstance(call, LayerCall)]
    outside = used_outside_calls(forward.order, in_graph, parameters)
    elsewhere = {id(parameters[name]) for name in outside}
    found = {call.name for call in in_graph if call.axis is None}
    return found | {
        name for name, layer in layers.items() if any(id(p) in elsewhere for p in trainable_parameters(layer).values())
    }


def _not_by_formula(forward: Forward, parameters: Parameters, layers: dict[str, nn.Module]) -> list[str]:
    """Return the names of parameters of no layer whose formula applies."""
    unfit = _unfit_layers(forward, parameters, layers)
    return list(parameters_outside(parameters, {name: layer for name, layer in layers.items() if name not in unfit}))
