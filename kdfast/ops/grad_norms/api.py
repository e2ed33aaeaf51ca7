"""Ghost norms: the norm of each sample's gradient of a whole network, without the gradients.

One forward and one backward pass of the summed loss give every layer's inputs `a` and output gradients `b`; a sample's
weight gradient is `G = sum_t b_t a_t^T`, and `||G||` follows from the factors. Nothing of the size samples x weights is
ever held.

Sources: I. Goodfellow, *Efficient per-example gradient computations*, 2015 (arXiv 1510.01799); X. Li et al., *Large
language models can be strong differentially private learners*, ICLR 2022 (ghost norms of sequences); G. Rochette,
A. Manoel, E. Tramel, *Efficient per-example gradient computations in convolutional neural networks*, 2019 (arXiv
1912.06015).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops.grad_norms.batch_axis import Batch, foreign_rows, shared_rows
from kdfast.ops.grad_norms.capture import Call, backward, captured, in_graph, stray
from kdfast.ops.grad_norms.dispatch import METHODS
from kdfast.ops.grad_norms.factors import Part
from kdfast.ops.grad_norms.fallback import FALLBACKS, RandomState, Squares
from kdfast.ops.grad_norms.layers import kind_of, own_parameters, refuse_batch_statistics
from kdfast.ops.grad_norms.objective import Loss, Objective, check_inputs, run
from kdfast.ops.grad_norms.tied_weights import squares_of_sum
from kdfast.ops.grad_norms.ways import Ways

__all__ = ["grad_norms"]


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
    """Norm of the gradient of each sample's loss with respect to the trainable parameters.

    Knows Linear (also on sequences), Conv1d, Conv2d, Embedding, BatchNorm in eval mode, LayerNorm, RMSNorm, GroupNorm
    and their biases. Parameters that are used more than once count with the sum of their gradients; frozen ones not at
    all. The model is left as it was: mode, hooks, ``grad``, ``requires_grad``. Samples lie along the first dimension
    of the inputs and of everything inside the model.

    Args:
        model: Any network without statistics over the batch.
        inputs: A tensor, a tuple of arguments, or a dict of keyword arguments. Where samples are run apart (the
            fallbacks, and to tell rows that are samples from others), every tensor as long as the batch is split.
        labels: `(N,)` int64; whatever a loss of your own takes.
        loss: "cross_entropy" or "kd" of the logits `(N, C)` (what the model returns, or its ``.logits``), or a function
            (outputs, labels) -> `(N,)` losses.
        per_layer: Return one norm a layer instead.
        teacher: `(N, C)` the teacher's logits, for "kd".
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        fallback: What to do with parameters of other layers: "error"; "vmap" to run the model on all samples side by
            side for them, which takes longer and more memory; "loop" to run it on one sample after the other, for
            models that vmap cannot run.
        method: "auto" takes the cheapest way for each layer; "direct", "gram" or "pixel" force one
            (``kdfast.ops.grad_norms.dispatch``).
        backend: "auto", or an implementation's name in the row "grad_norms" of ``kdfast.ops.backends``.

    Returns:
        `(N,)`, in float32 (float64 for a model in float64); with ``per_layer`` a dict of such, by the name of the
        module that holds the parameters ("" is the model itself), each shared parameter at its first module.

    Raises:
        UsageError: A layer has no formula, or statistics over the batch; an argument is not one of its choices; devices
            differ.
        ShapeError: Shapes do not fit, or the first dimension inside the model is not the sample's.
        DataError: Inputs or losses are not finite, a label is out of range, or the batch is empty.
        BackendUnavailable: A named implementation cannot run here.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> kdfast.grad_norms(net, torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """
    if fallback not in ("error", *FALLBACKS):
        raise UsageError(f"fallback={fallback!r}: choose one of error, {', '.join(FALLBACKS)}")
    if method not in METHODS:
        raise UsageError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose graphs hooks do not reach
    check_inputs(model, inputs)
    refuse_batch_statistics(model)
    objective = Objective(loss, labels, teacher, alpha, temperature)
    with torch.inference_mode(False), torch.enable_grad():
        found, lengths, dtype = _squares(model, inputs, objective, FALLBACKS.get(fallback), Ways(method, backend))
    layers: dict[str, Tensor] = {}
    for name, value in found.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers[layer] + value if layer in layers else value
    if per_layer:
        return {name: _norm(value, lengths, dtype) for name, value in layers.items()}
    return _norm(sum(layers.values(), torch.zeros_like(next(iter(layers.values())))), lengths, dtype)


def _norm(squares: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Norms from squares of gradients that were scaled by the inverse lengths.

    Raises:
        DataError: One is not finite.
    """
    norms = squares.sqrt() if lengths is None else squares.double().sqrt() * lengths
    norms = norms.to(dtype)
    if not bool(norms.isfinite().all()):
        bad = int((~norms.isfinite()).nonzero()[0])
        raise DataError(
            f"the gradient of sample {bad} is not finite, or its square overflows: look for huge activations, or "
            "convert the model and its inputs to float64"
        )
    return norms


def _squares(
    model: nn.Module, inputs: Any, objective: Objective, fallback: Squares | None, ways: Ways
) -> tuple[dict[str, Tensor], Tensor | None, torch.dtype]:
    """Squared norms `(N,)` by the name of each trainable parameter, for slopes at the logits of length 1.

    Returns:
        The squares; the slopes' lengths `(N,)`, None where they were left as they are; and the precision they are good
        for.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UsageError("the model has no trainable parameter: set requires_grad on what is to be scored")
    layers = {name: layer for name, layer in model.named_modules() if own_parameters(layer)}
    unknown = {name: layer for name, layer in layers.items() if kind_of(layer) is None}
    if unknown and not fallback:
        raise UsageError(_no_formula(unknown))
    known = {name: layer for name, layer in layers.items() if name not in unknown}
    random = RandomState(next(iter(parameters.values())).device)
    with captured(known) as calls:
        outputs = run(model, inputs)
        n = len(objective.checked(outputs))
    objective, lengths = objective.linear(outputs)
    total = objective(outputs).sum()
    calls, order = in_graph(calls, total)
    batch = Batch(model, inputs, objective, known, n)
    repeat = shared_rows(batch, calls)
    if repeat:
        random.restore()
        with captured(known, repeat, n) as calls:
            outputs = run(model, inputs)
        total = objective(outputs).sum()
        calls, order = in_graph(calls, total)
    foreign = foreign_rows(batch, calls, repeat)
    slow = {id(p) for layer in unknown.values() for p in own_parameters(layer).values()}
    slow |= _not_covered(
        [name for name in stray(order, calls, parameters) if id(parameters[name]) not in slow],
        [call for call in calls if call.name in foreign],
        parameters,
        None if fallback else n,
    )
    kept = [call for call in calls if any(id(p) not in slow for p in own_parameters(call.layer).values())]
    sums = _Sums({id(p): p for p in parameters.values() if id(p) not in slow}, kept, ways)
    backward(total, order, kept, sums.receive)
    sums.finish()
    double = any(p.dtype == torch.float64 for p in parameters.values())
    dtype = torch.float64 if double else torch.float32
    found = {name: sums.squares.get(id(p), p.new_zeros(n, dtype=dtype)) for name, p in parameters.items()}
    del total, outputs, order, calls, kept
    if slow and fallback:
        chosen = {name: p for name, p in parameters.items() if id(p) in slow}
        found.update(fallback(model, inputs, objective, chosen, n))
    return found, lengths, dtype


def _not_covered(
    strays: list[str], foreign: list[Call], parameters: dict[str, nn.Parameter], refuse: int | None
) -> set[int]:
    """Parameters, by their id, that no formula holds for though their layers have one.

    Args:
        strays: Names of those that are used outside of their layers.
        foreign: Calls whose rows are not the samples.
        parameters: All, by name.
        refuse: Samples in the batch when there is no fallback for them.

    Raises:
        UsageError, ShapeError: There is one, and no fallback.
    """
    if strays and refuse is not None:
        raise UsageError(
            f"parameter {strays[0]!r} is used outside of the forward pass of its layer: its gradient has no formula; "
            "fallback='vmap' runs the model sample by sample for it, or fallback='loop'"
        )
    if foreign and refuse is not None:
        raise ShapeError(
            f"layer {foreign[0].name!r} returned {foreign[0].rows} rows for a batch of {refuse} samples, and they are "
            "not the samples: the first dimension must be theirs, also inside the model; fallback='vmap' does without"
        )
    found = {id(parameters[name]) for name in strays}
    return found | {id(p) for call in foreign for p in own_parameters(call.layer).values()}


class _Sums:
    """Squared norms of the parameters, each as soon as the last of its uses has come."""

    def __init__(self, parameters: dict[int, nn.Parameter], calls: list[Call], ways: Ways) -> None:
        self.squares: dict[int, Tensor] = {}
        self._parameters = parameters
        self._ways = ways
        self._parts: dict[int, list[Part]] = {}
        self._left = Counter(id(p) for call in calls for p in own_parameters(call.layer).values())

    def receive(self, call: Call, grad: Tensor) -> None:
        """Take one call's output gradient."""
        kind = kind_of(call.layer)
        assert kind is not None
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            x = call.take()
            if grad.dtype in (torch.float16, torch.bfloat16):
                grad = grad.float()
            try:
                parts = kind(call.layer, x.to(grad.dtype) if x.is_floating_point() else x, grad)
            except UsageError as error:
                raise UsageError(f"layer {call.name!r}: {error}") from None
            for name, p in own_parameters(call.layer).items():
                if id(p) in self._parameters:
                    self._parts.setdefault(id(p), []).append(parts[name]())
                    self._left[id(p)] -= 1
                    if not self._left[id(p)]:
                        self._close(id(p))

    def finish(self) -> None:
        """Close the parameters of which not all uses led to the loss."""
        with torch.no_grad():
            for key in list(self._parts):
                self._close(key)

    def _close(self, key: int) -> None:
        parts = self._parts.pop(key)
        if len(parts) == 1:
            self.squares[key] = self._ways.squares(parts[0])
        else:
            self.squares[key] = squares_of_sum(parts, self._parameters[key].shape, self._ways.squares)


def _no_formula(unknown: dict[str, nn.Module]) -> str:
    named = ", ".join(f"{name!r} ({type(layer).__name__})" for name, layer in unknown.items())
    return (
        f"no formula for the parameters of {named}: freeze them with requires_grad_(False), or pass fallback='vmap' to "
        "run the model sample by sample for them, or fallback='loop'"
    )
