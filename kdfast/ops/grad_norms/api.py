"""Norms of each sample's gradient over a whole network, without forming the gradients ("ghost norms").

One forward and one backward pass of the summed loss give every layer's inputs `a` and output gradients `b`; a sample's
weight gradient is `G = sum_t b_t a_t^T`, and `||G||` follows from these factors. No buffer of size samples x weights is
allocated.

Sources: I. Goodfellow, *Efficient per-example gradient computations*, 2015 (arXiv 1510.01799); X. Li et al., *Large
language models can be strong differentially private learners*, ICLR 2022 (ghost norms of sequences); G. Rochette,
A. Manoel, E. Tramel, *Efficient per-example gradient computations in convolutional neural networks*, 2019 (arXiv
1912.06015).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops.float32 import full_float32
from kdfast.ops.grad_norms.batch_axis import Batch, expandable_layers, layers_without_batch_axis
from kdfast.ops.grad_norms.capture import Call, calls_in_graph, record_calls, run_backward, used_outside_calls
from kdfast.ops.grad_norms.dispatch import METHODS, squared_norms
from kdfast.ops.grad_norms.fallback import FALLBACKS, Fallback, RngSnapshot
from kdfast.ops.grad_norms.graph import Node
from kdfast.ops.grad_norms.layers import find_formula, reject_batch_statistics, trainable_parameters
from kdfast.ops.grad_norms.objective import Loss, Objective, call_model, check_inputs
from kdfast.ops.grad_norms.tied_weights import SquaredNormAccumulator, SquaredNorms

__all__ = ["grad_norms"]

Parameters = dict[str, nn.Parameter]


@full_float32()
def grad_norms(
    model: nn.Module,
    inputs: Any,
    labels: Any,
    *,
    loss: Loss = "cross_entropy",
    per_layer: bool = False,
    teacher: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 4.0,
    fallback: str = "error",
    method: str = "auto",
    backend: str = "auto",
) -> Tensor | dict[str, Tensor]:
    """Compute the norm of the gradient of each sample's loss with respect to the trainable parameters.

    Supports Linear (also on sequences), Conv1d, Conv2d, Embedding, BatchNorm in eval mode, LayerNorm, RMSNorm and
    GroupNorm, with their biases. A parameter used more than once counts with the sum of its gradients; frozen
    parameters do not count. The model is left unchanged: mode, hooks, ``grad``, ``requires_grad``. The first dimension
    of the inputs and of every activation must be the batch.

    Args:
        model: Any network that does not use statistics of the batch.
        inputs: A tensor, a tuple of arguments, or a dict of keyword arguments. Where samples are run separately (by the
            fallbacks, and to identify the batch dimension), every tensor as long as the batch is split.
        labels: `(N,)` int64; for a custom loss, anything it accepts.
        loss: "cross_entropy" or "kd" of the logits `(N, C)` (the model's output, or its ``.logits``), or a function
            (outputs, labels) -> `(N,)` losses.
        per_layer: Return one norm per layer instead.
        teacher: The teacher's logits `(N, C)`, for "kd".
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        fallback: How to treat parameters of other layers: "error" raises; "vmap" runs the model on all samples
            in parallel for them, which takes more time and memory; "loop" runs it on one sample at a time, for models
            that vmap cannot run.
        method: "auto" selects the cheapest algorithm for each layer; "direct", "gram" or "pixel" forces one
            (``kdfast.ops.grad_norms.dispatch``).
        backend: "auto", or the name of an implementation in the row "grad_norms" of ``kdfast.ops.backends``.

    Returns:
        `(N,)` in float32 (float64 for a model in float64). With ``per_layer``, a dict of such tensors by the name of
        the module that owns the parameters ("" is the model itself); a shared parameter counts at its first module.

    Raises:
        UsageError: If a layer has no formula or uses statistics of the batch; if an argument is not one of its choices;
            or if devices differ.
        ShapeError: If shapes do not fit, or the first dimension of an activation is not the batch.
        DataError: If inputs or losses are not finite, a label is out of range, or the batch is empty.
        BackendUnavailable: If a named implementation cannot run here.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> kdfast.grad_norms(net, torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """
    if fallback not in ("error", *FALLBACKS):
        raise UsageError(f"`fallback` is {fallback!r}: choose one of error, {', '.join(FALLBACKS)}")
    if method not in METHODS:
        raise UsageError(f"`method` is {method!r}: choose one of {', '.join(METHODS)}")
    model = getattr(model, "_orig_mod", model)  # hooks do not reach into the graphs of torch.compile
    check_inputs(model, inputs)
    reject_batch_statistics(model)
    objective = Objective(loss, labels, teacher, alpha, temperature)
    squared = partial(squared_norms, method=method, backend=backend)
    with torch.inference_mode(False), torch.enable_grad():
        squares, scales, dtype = _squares_by_parameter(model, inputs, objective, FALLBACKS.get(fallback), squared)
    layers: dict[str, Tensor] = {}
    for name, value in squares.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers[layer] + value if layer in layers else value
    if per_layer:
        return {name: _norms(value, scales, dtype) for name, value in layers.items()}
    return _norms(sum(layers.values(), torch.zeros_like(next(iter(layers.values())))), scales, dtype)


def _norms(squares: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the norms, given the squares of gradients divided by ``scales``.

    Raises:
        DataError: If a norm is not finite.
    """
    norms = squares.sqrt() if scales is None else squares.double().sqrt() * scales
    norms = norms.to(dtype)
    if not bool(norms.isfinite().all()):
        bad = int((~norms.isfinite()).nonzero()[0])
        raise DataError(
            f"the gradient of sample {bad} is not finite, or its square overflows: check for huge activations, or "
            "convert the model and its inputs to float64"
        )
    return norms


@dataclass
class _Forward:
    """A recorded forward pass.

    Attributes:
        objective: The linearized loss.
        scales: Norms `(N,)` of the gradients at the logits that divided the loss; None if nothing did.
        n: Number of samples.
        loss: The linearized loss, summed over the samples.
        calls: Recorded calls that the loss depends on.
        order: ``sort_topologically`` of the loss.
        foreign: Names of layers whose first dimension is not the batch.
    """

    objective: Objective
    scales: Tensor | None
    n: int
    loss: Tensor
    calls: list[Call]
    order: list[Node]
    foreign: set[str]


def _squares_by_parameter(
    model: nn.Module, inputs: Any, objective: Objective, fallback: Fallback | None, squared: SquaredNorms
) -> tuple[dict[str, Tensor], Tensor | None, torch.dtype]:
    """Compute the squared norms `(N,)` for each trainable parameter, with gradients at the logits scaled to norm 1.

    Returns:
        The squares by parameter name, the ``scales`` of ``_Forward``, and the dtype for the result.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UsageError("the model has no trainable parameter: set requires_grad on the parameters of interest")
    layers = {name: layer for name, layer in model.named_modules() if trainable_parameters(layer)}
    unsupported = {name: layer for name, layer in layers.items() if find_formula(layer) is None}
    if unsupported and not fallback:
        raise UsageError(_describe_unsupported(unsupported))
    supported = {name: layer for name, layer in layers.items() if name not in unsupported}
    device = next(iter(parameters.values())).device
    double = any(p.dtype == torch.float64 for p in parameters.values())
    dtype = torch.float64 if double else torch.float32

    forward = _record_forward(model, inputs, objective, supported, device)
    objective, scales, n = forward.objective, forward.scales, forward.n
    uncovered = {id(p) for layer in unsupported.values() for p in trainable_parameters(layer).values()}
    uncovered |= _uncovered_by_formulas(forward, parameters, uncovered, allowed=fallback is not None)
    covered = {id(p): p for p in parameters.values() if id(p) not in uncovered}
    squares = _squares_by_formula(forward, covered, squared)
    del forward  # frees the graph before the fallback runs
    found = {name: squares.get(id(p), p.new_zeros(n, dtype=dtype)) for name, p in parameters.items()}
    if uncovered and fallback:
        remaining = {name: p for name, p in parameters.items() if id(p) in uncovered}
        found.update(fallback(model, inputs, objective, remaining, n))
    return found, scales, dtype


def _record_forward(
    model: nn.Module, inputs: Any, objective: Objective, layers: dict[str, nn.Module], device: torch.device
) -> _Forward:
    """Run the forward pass; run it again with the same random numbers if rows shared by all samples can be expanded."""
    rng = RngSnapshot(device)
    with record_calls(layers) as calls:
        outputs = call_model(model, inputs)
        n = len(objective.checked_losses(outputs))
    objective, scales = objective.linearize(outputs)
    loss = objective(outputs).sum()
    calls, order = calls_in_graph(calls, loss)
    batch = Batch(model, inputs, objective, layers, n)
    expand = expandable_layers(batch, calls)
    if expand:
        rng.restore()
        with record_calls(layers, expand, n) as calls:
            outputs = call_model(model, inputs)
        loss = objective(outputs).sum()
        calls, order = calls_in_graph(calls, loss)
    return _Forward(objective, scales, n, loss, calls, order, layers_without_batch_axis(batch, calls, expand))


def _uncovered_by_formulas(forward: _Forward, parameters: Parameters, known: set[int], allowed: bool) -> set[int]:
    """Return the ids of parameters whose layers have a formula that does not apply.

    Args:
        forward: The recorded forward pass.
        parameters: All trainable parameters, by name.
        known: Ids of parameters of layers without a formula.
        allowed: Whether there is a fallback for them.

    Raises:
        UsageError: If a parameter is used outside its layer, without a fallback.
        ShapeError: If a layer's rows are not samples, without a fallback.
    """
    names = used_outside_calls(forward.order, forward.calls, parameters)
    names = [name for name in names if id(parameters[name]) not in known]
    foreign = [call for call in forward.calls if call.name in forward.foreign]
    if names and not allowed:
        raise UsageError(
            f"parameter {names[0]!r} is used outside the forward pass of its layer, so no formula applies: pass "
            "fallback='vmap' to run the model sample by sample for it, or fallback='loop'"
        )
    if foreign and not allowed:
        raise ShapeError(
            f"layer {foreign[0].name!r} returned {foreign[0].rows} rows for a batch of {forward.n} samples, and they "
            "are not the samples: make the batch the first dimension of every activation, or pass fallback='vmap'"
        )
    return {id(parameters[name]) for name in names} | {
        id(p) for call in foreign for p in trainable_parameters(call.layer).values()
    }


def _squares_by_formula(
    forward: _Forward, parameters: dict[int, nn.Parameter], squared: SquaredNorms
) -> dict[int, Tensor]:
    """Run the backward pass and return the squared norms of the given parameters, by id; unused ones are missing."""
    calls = [
        call for call in forward.calls if any(id(p) in parameters for p in trainable_parameters(call.layer).values())
    ]
    accumulator = SquaredNormAccumulator(parameters, calls, squared)
    run_backward(forward.loss, forward.order, calls, accumulator.receive)
    accumulator.finish()
    return accumulator.squares


def _describe_unsupported(layers: dict[str, nn.Module]) -> str:
    named = ", ".join(f"{name!r} ({type(layer).__name__})" for name, layer in layers.items())
    return (
        f"no formula for the parameters of {named}: freeze them with requires_grad_(False), or pass fallback='vmap' to "
        "run the model sample by sample for them, or fallback='loop'"
    )
