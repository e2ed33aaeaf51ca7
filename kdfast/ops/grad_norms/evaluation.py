"""Evaluation of a functional of each sample's gradient, parameter by parameter.

One forward and one backward pass of the summed loss give every layer's inputs `a` and output gradients `b`; a sample's
weight gradient is `G = sum_t b_t a_t^T`, and the functional follows from these factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.fallback import FALLBACKS, Fallback
from kdfast.ops.grad_norms.functionals import Functional
from kdfast.ops.grad_norms.layers import reject_unsuitable_layers
from kdfast.ops.grad_norms.objective import Objective
from kdfast.ops.grad_norms.recording.batch_axis import Batch
from kdfast.ops.grad_norms.recording.capture import run_backward
from kdfast.ops.grad_norms.recording.forward import Forward, record_forward
from kdfast.ops.grad_norms.tied_weights import FactorCollector
from kdfast.ops.model_inputs import check_inputs, check_plain, count_samples, unchanged_buffers, unwrap

__all__ = ["Evaluated", "evaluate", "make_batch", "trainable"]

Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Evaluated:
    """A functional of the gradients of the losses divided by ``scales``.

    Attributes:
        values: By parameter name.
        scales: Norms `(N,)` of the gradients at the logits; None for 1.
        dtype: The dtype for results.
    """

    values: dict[str, Tensor]
    scales: Tensor | None
    dtype: torch.dtype


def make_batch(model: nn.Module, inputs: Any, labels: Any, batch_dim: int, objective: Objective) -> Batch:
    """Return a batch after checking the model, its inputs and the options; arguments as for ``grad_norms``.

    Raises:
        UsageError: If an option is unknown, or the model is unsuitable.
        ShapeError: If there is another number of labels than of samples.
        DataError: If an input is not finite.
    """
    if not isinstance(batch_dim, (int, np.integer)) or batch_dim < 0:
        raise UsageError(f"`batch_dim` is {batch_dim!r}: pass a dimension of the inputs, counted from 0")
    model = unwrap(model)
    check_inputs(model, inputs)
    check_plain("labels", labels)
    reject_unsuitable_layers(model)
    objective.check_loss()
    with torch.inference_mode(False):
        inputs, labels, teacher, rows = map(
            _outside_inference_mode, (inputs, labels, objective.teacher, objective.rows)
        )
    objective = replace(objective, labels=labels, teacher=teacher, rows=rows)
    return Batch(model, inputs, objective, count_samples(inputs, labels, batch_dim), batch_dim)


def _outside_inference_mode(values: Any) -> Any:
    """Return the values with copies of tensors of ``torch.inference_mode``, which autograd refuses to save."""
    return tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, values)


def trainable(model: nn.Module) -> Parameters:
    """Return the trainable parameters by name.

    Raises:
        UsageError: If there are none.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UsageError("the model has no trainable parameter: set requires_grad on the parameters of interest")
    return parameters


def evaluate(batch: Batch, fallback: str, functional_for: Callable[[Tensor | None], Functional]) -> Evaluated:
    """Evaluate a functional for each trainable parameter, with gradients at the logits scaled to norm 1.

    Args:
        batch: The batch.
        fallback: As for ``grad_norms``.
        functional_for: Returns the functional, given the scales of ``Evaluated``.

    Raises:
        UsageError: If ``fallback`` is unknown, or a parameter is not covered.
        ShapeError: If shapes do not fit.
        DataError: If a loss is not finite, or a label is out of range.
    """
    if fallback not in ("error", *FALLBACKS):
        raise UsageError(f"`fallback` is {fallback!r}: choose one of error, {', '.join(FALLBACKS)}")
    with torch.inference_mode(False), torch.enable_grad(), unchanged_buffers(batch.model):
        return _evaluate(batch, FALLBACKS.get(fallback), functional_for)


def _evaluate(
    batch: Batch, fallback: Fallback | None, functional_for: Callable[[Tensor | None], Functional]
) -> Evaluated:
    parameters = trainable(batch.model)
    double = any(p.dtype == torch.float64 for p in parameters.values())
    dtype = torch.float64 if double else torch.float32
    if batch.n == 0:
        functional = functional_for(None)
        return Evaluated({name: functional.zeros(p, 0) for name, p in parameters.items()}, None, dtype)

    forward, uncovered = record_forward(batch, parameters)
    functional = functional_for(forward.scales)
    covered = {id(p): p for name, p in parameters.items() if name not in uncovered}
    found: dict[str, Tensor] = {}
    if uncovered and batch.n == 1:
        found = _only_sample(forward, {name: parameters[name] for name in uncovered}, functional)
        uncovered = {}
    if uncovered and not fallback:
        raise UsageError(_describe(uncovered))
    batch, scales, losses = forward.batch, forward.scales, forward.losses.detach()
    values, failed = _by_formula(forward, covered, functional)
    del forward  # frees the graph before the fallback runs
    uncovered |= {name: failed[id(p)] for name, p in parameters.items() if id(p) in failed}
    if uncovered and not fallback:
        raise UsageError(_describe(uncovered))
    for name, p in parameters.items():
        if name not in found:
            found[name] = values[id(p)] if id(p) in values else functional.zeros(p, batch.n)
    if uncovered and fallback:
        found.update(fallback(batch, {name: parameters[name] for name in uncovered}, losses, functional))
    return Evaluated(found, scales, dtype)


def _only_sample(forward: Forward, parameters: Parameters, functional: Functional) -> dict[str, Tensor]:
    """Evaluate the functional of the gradients of a batch of one sample."""
    grads = torch.autograd.grad(forward.losses.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    found = {name: functional.zeros(p, 1) for name, p in parameters.items()}
    for (name, p), grad in zip(parameters.items(), grads, strict=True):
        if grad is not None:
            functional.add(found[name], p, grad.unsqueeze(0), slice(0, 1))
    return found


def _by_formula(
    forward: Forward, parameters: dict[int, nn.Parameter], functional: Functional
) -> tuple[dict[int, Tensor], dict[int, str]]:
    """Run the backward pass and evaluate the functional of the given parameters, by id; unused ones are missing.

    Returns:
        The values, and the reasons why others failed.
    """
    calls = [call for call in forward.calls if any(id(p) in parameters for p in call.parameters())]
    collector = FactorCollector(parameters, calls, functional.evaluate)
    losses = forward.losses
    if functional.loss_weights is not None:
        losses = losses * functional.loss_weights
    run_backward(losses.sum(), forward.order, calls, collector.receive)
    collector.finish()
    return collector.values, {key: f"is not covered: {error}" for key, error in collector.failed.items()}


def _describe(uncovered: dict[str, str]) -> str:
    name, reason = next(iter(uncovered.items()))
    return (
        f"parameter {name!r} {reason}: freeze it with requires_grad_(False), tell kdfast.register_grad_norms how to "
        "compute its layer's gradients, or pass fallback='vmap' to run the model sample by sample for it, or "
        "fallback='loop'"
    )
