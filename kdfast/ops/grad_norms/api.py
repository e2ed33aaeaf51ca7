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

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import DataError, UsageError
from kdfast.ops.float32 import full_float32
from kdfast.ops.grad_norms.dispatch import METHODS, squared_norms
from kdfast.ops.grad_norms.fallback import FALLBACKS, Fallback
from kdfast.ops.grad_norms.layers import reject_unsuitable_layers
from kdfast.ops.grad_norms.objective import Loss, Objective
from kdfast.ops.grad_norms.recording.batch_axis import Batch
from kdfast.ops.grad_norms.recording.capture import run_backward
from kdfast.ops.grad_norms.recording.forward import Forward, record_forward
from kdfast.ops.grad_norms.tied_weights import SquaredNormAccumulator, SquaredNorms
from kdfast.ops.kd_loss.call import TopKTeacher
from kdfast.ops.model_inputs import check_inputs, count_samples, unchanged_buffers, unwrap

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
    teacher: Tensor | TopKTeacher | None = None,
    rows: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 4.0,
    ignore_index: int = -100,
    batch_dim: int = 0,
    fallback: str = "error",
    method: str = "auto",
    backend: str = "auto",
) -> Tensor | dict[str, Tensor]:
    """Compute the norm of the gradient of each sample's loss with respect to the trainable parameters.

    Linear (also on sequences), Conv1d, Conv2d, Embedding, BatchNorm in eval mode, LayerNorm, RMSNorm and GroupNorm have
    formulas. Parameters of other layers, and those that the model uses itself, such as class tokens, position
    embeddings and layer scales, are scored by the operations that they enter: by formulas for common ones, otherwise by
    running that operation alone again on each sample. A parameter used more than once counts with the sum of its
    gradients; frozen parameters do not count. The model is left unchanged: mode, hooks, ``grad``, ``requires_grad``,
    buffers.

    Args:
        model: Any network that does not use statistics of the batch.
        inputs: A tensor, a tuple of arguments, or a dict of keyword arguments. Where samples are run separately (by the
            fallbacks, and to identify the samples' dimension), every tensor as long as the batch is split.
        labels: `(N,)` int64, or probabilities `(N, C)`; for a custom loss, anything it accepts.
        loss: "cross_entropy" or "kd" of the logits `(N, C)` (the model's output, or its ``.logits``), or a function
            (outputs, labels) -> `(N,)` losses.
        per_layer: Return one norm per layer instead.
        teacher: The teacher's logits `(N, C)` or a ``TopKTeacher``, for "kd".
        rows: `(N,)` int64, the teacher's row of each sample; None for row i.
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        ignore_index: The norm of samples with this label is 0.
        batch_dim: The dimension of the inputs that counts the samples: 1 for the time-first layout of ``nn.LSTM`` and
            ``nn.Transformer``. Layers and outputs may have them elsewhere; the losses are `(N,)`.
        fallback: How to treat parameters that neither a layer's formula nor their operations cover: "error" raises;
            "vmap" runs the model on all samples in parallel for them, which takes more time and memory; "loop" runs it
            on one sample at a time, for models that vmap cannot run. ``kdfast.register_grad_norms`` avoids both.
        method: "auto" selects the cheapest algorithm for each layer; "direct", "gram" or "pixel" forces one
            (``kdfast.ops.grad_norms.dispatch``).
        backend: "auto", or the name of an implementation in the row "grad_norms" of ``kdfast.ops.backends``.

    Returns:
        `(N,)` in float32 (float64 for a model in float64). With ``per_layer``, a dict of such tensors by the name of
        the module that owns the parameters ("" is the model itself); a shared parameter counts at its first module.

    Raises:
        UsageError: If a parameter is not covered, or split over processes; if a layer uses statistics of the batch; if
            an argument is not one of its choices; or if devices differ.
        ShapeError: If shapes do not fit, or the samples are not in ``batch_dim``.
        DataError: If inputs or losses are not finite, or a label is out of range.
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
    if batch_dim < 0:
        raise UsageError(f"`batch_dim` is {batch_dim}: pass a dimension of the inputs, counted from 0")
    model = unwrap(model)
    check_inputs(model, inputs)
    reject_unsuitable_layers(model)
    objective = Objective(loss, labels, teacher, alpha, temperature, rows=rows, ignore_index=ignore_index)
    objective.check_name()
    batch = Batch(model, inputs, objective, count_samples(inputs, labels, batch_dim), batch_dim)
    squared = partial(squared_norms, method=method, backend=backend)
    with torch.inference_mode(False), torch.enable_grad(), unchanged_buffers(model):
        squares, scales, dtype = _squares_by_parameter(batch, FALLBACKS.get(fallback), squared)
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


def _squares_by_parameter(
    batch: Batch, fallback: Fallback | None, squared: SquaredNorms
) -> tuple[dict[str, Tensor], Tensor | None, torch.dtype]:
    """Compute the squared norms `(N,)` for each trainable parameter, with gradients at the logits scaled to norm 1.

    Returns:
        The squares by parameter name, the ``scales`` of ``Forward``, and the dtype for the result.
    """
    model = batch.model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UsageError("the model has no trainable parameter: set requires_grad on the parameters of interest")
    double = any(p.dtype == torch.float64 for p in parameters.values())
    dtype = torch.float64 if double else torch.float32
    if batch.n == 0:
        return {name: p.new_zeros(0, dtype=dtype) for name, p in parameters.items()}, None, dtype

    forward, uncovered = record_forward(batch, parameters)
    covered = {id(p): p for name, p in parameters.items() if name not in uncovered}
    found: dict[str, Tensor] = {}
    if uncovered and batch.n == 1:
        found = _only_sample(forward, {name: parameters[name] for name in uncovered}, dtype)
        uncovered = {}
    if uncovered and not fallback:
        raise UsageError(_describe(uncovered))
    batch, scales, losses = forward.batch, forward.scales, forward.losses.detach()
    squares, failed = _squares_by_formula(forward, covered, squared)
    del forward  # frees the graph before the fallback runs
    uncovered |= {name: failed[id(p)] for name, p in parameters.items() if id(p) in failed}
    if uncovered and not fallback:
        raise UsageError(_describe(uncovered))
    for name, p in parameters.items():
        found.setdefault(name, squares.get(id(p), p.new_zeros(batch.n, dtype=dtype)))
    if uncovered and fallback:
        found.update(fallback(batch, {name: parameters[name] for name in uncovered}, losses))
    return found, scales, dtype


def _only_sample(forward: Forward, parameters: Parameters, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute the squared norms `(1,)` of the gradients of a batch of one sample."""
    grads = torch.autograd.grad(forward.losses.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    zero = torch.zeros(1, dtype=dtype, device=forward.losses.device)
    return {
        name: zero if g is None else g.to(dtype).square().sum().reshape(1)
        for name, g in zip(parameters, grads, strict=True)
    }


def _squares_by_formula(
    forward: Forward, parameters: dict[int, nn.Parameter], squared: SquaredNorms
) -> tuple[dict[int, Tensor], dict[int, str]]:
    """Run the backward pass and return the squared norms of the given parameters, by id; unused ones are missing.

    Returns:
        The squares, and the reasons why others failed.
    """
    calls = [call for call in forward.calls if any(id(p) in parameters for p in call.parameters())]
    accumulator = SquaredNormAccumulator(parameters, calls, squared)
    run_backward(forward.losses.sum(), forward.order, calls, accumulator.receive)
    accumulator.finish()
    return accumulator.squares, {key: f"is not covered: {error}" for key, error in accumulator.failed.items()}


def _describe(uncovered: dict[str, str]) -> str:
    name, reason = next(iter(uncovered.items()))
    return (
        f"parameter {name!r} {reason}: freeze it with requires_grad_(False), tell kdfast.register_grad_norms how to "
        "compute its layer's gradients, or pass fallback='vmap' to run the model sample by sample for it, or "
        "fallback='loop'"
    )
