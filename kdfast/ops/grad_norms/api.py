"""Norms of each sample's gradient over a whole network, without forming the gradients ("ghost norms").

Also norms in a diagonal metric, the diagonal of the Fisher matrix, and dot products with a given vector.

Sources: I. Goodfellow, *Efficient per-example gradient computations*, 2015 (arXiv 1510.01799); X. Li et al., *Large
language models can be strong differentially private learners*, ICLR 2022 (ghost norms of sequences); G. Rochette,
A. Manoel, E. Tramel, *Efficient per-example gradient computations in convolutional neural networks*, 2019 (arXiv
1912.06015).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import DataError, UsageError
from kdfast.ops.float32 import full_float32
from kdfast.ops.grad_norms.dispatch import METHODS
from kdfast.ops.grad_norms.evaluation import evaluate, make_batch, trainable
from kdfast.ops.grad_norms.functionals import DotProducts, SquaredNorms, SumsOfSquares, check_vectors, weights_of
from kdfast.ops.grad_norms.objective import Loss, Objective
from kdfast.ops.kd_loss.call import TopKTeacher

__all__ = ["fisher_diagonal", "grad_dots", "grad_norms"]


@full_float32()
def grad_norms(
    model: nn.Module,
    inputs: Any,
    labels: Any,
    *,
    metric: Mapping[str, Tensor] | None = None,
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
    buffers. The first call with a model, loss and mode also runs a few samples in another order, to find models that
    sort their samples or mix them. Calls on one model must not run in several threads at once: each adds hooks to it.

    Args:
        model: Any network that treats each sample alone, in the order of the inputs; other orders need
            ``fallback="loop"``.
        inputs: A tensor, a tuple of arguments, or a dict of keyword arguments. Where samples are run separately (by the
            fallbacks, and to identify the samples' dimension), every tensor as long as the batch is split.
        labels: `(N,)` int64, or probabilities `(N, C)`; for a custom loss, anything it accepts.
        metric: For each trainable parameter, by its name in ``model.named_parameters()``, a tensor `F` of its shape
            with positive entries, such as a damped ``fisher_diagonal``: the norm is then `sqrt(sum_j g_j^2 / F_j)`.
            None for 1.
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
            (``kdfast.ops.grad_norms.dispatch``). A metric needs "auto" or "direct".
        backend: "auto", or the name of an implementation in the row "grad_norms" of ``kdfast.ops.backends``.

    Returns:
        `(N,)` in float32 (float64 for a model in float64). With ``per_layer``, a dict of such tensors by the name of
        the module that owns the parameters ("" is the model itself); a shared parameter counts at its first module.

    Raises:
        UsageError: If a parameter is not covered, or split over processes; if a layer uses statistics of the batch; if
            an argument is not one of its choices; if ``metric`` lacks a parameter, or has others; or if devices differ.
        ShapeError: If shapes do not fit, or the samples are not in ``batch_dim``.
        DataError: If inputs or losses are not finite, a label is out of range, or the metric is not positive.
        BackendUnavailable: If a named implementation cannot run here.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> kdfast.grad_norms(net, torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """
    if method not in METHODS:
        raise UsageError(f"`method` is {method!r}: choose one of {', '.join(METHODS)}")
    objective = Objective(loss, labels, teacher, alpha, temperature, rows=rows, ignore_index=ignore_index)
    batch = make_batch(model, inputs, labels, batch_dim, objective)
    weights = None
    if metric is not None:
        if method not in ("auto", "direct"):
            raise UsageError(f"`method` is {method!r}: a `metric` needs 'auto' or 'direct', which form each gradient")
        weights = weights_of(metric, trainable(batch.model))
    functional = SquaredNorms(method, backend, weights)
    found = evaluate(batch, fallback, lambda scales: functional)
    layers: dict[str, Tensor] = {}
    for name, value in found.values.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers[layer] + value if layer in layers else value
    if per_layer:
        return {name: _norms(value, found.scales, found.dtype) for name, value in layers.items()}
    total = sum(layers.values(), torch.zeros_like(next(iter(layers.values()))))
    return _norms(total, found.scales, found.dtype)


@full_float32()
def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = "cross_entropy",
    teacher: Tensor | TopKTeacher | None = None,
    alpha: float = 0.5,
    temperature: float = 4.0,
    ignore_index: int = -100,
    batch_dim: int = 0,
    fallback: str = "error",
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Compute the sum over samples of the squared gradient of each sample's loss: `sum_n g_n * g_n`.

    Divided by the number of samples, this is the diagonal of the empirical Fisher matrix. As a metric of
    ``grad_norms`` it needs damping, since entries can be zero: for example ``F / N + 0.1 * (F / N).mean()``. Gradients
    of the samples are neither formed at once nor averaged over a batch before they are squared.

    Args:
        model: As for ``grad_norms``.
        batches: Pairs (inputs, labels), or, for a teacher with rows of its own, triples (inputs, labels, rows); each as
            for ``grad_norms``. Batches may differ in size.
        loss: As for ``grad_norms``.
        teacher: As for ``grad_norms``; the rows of all batches index it.
        alpha: As for ``grad_norms``.
        temperature: As for ``grad_norms``.
        ignore_index: As for ``grad_norms``.
        batch_dim: As for ``grad_norms``.
        fallback: As for ``grad_norms``.
        backend: As for ``grad_norms``.

    Returns:
        For each trainable parameter, by name, a tensor of its shape in float64, because squares of the gradients of
        well-fitted samples are below the range of float32. Batches are added in float64; the squares of a batch, whose
        gradients are in the model's dtype, at least in float32, relative to its largest gradient at the logits.

    Raises:
        UsageError: If there is no batch, or as for ``grad_norms``.
        ShapeError: As for ``grad_norms``.
        DataError: As for ``grad_norms``.
        BackendUnavailable: As for ``grad_norms``.

    Example:
        >>> net = torch.nn.Linear(12, 3)
        >>> batches = [(torch.randn(5, 12), torch.tensor([0, 1, 2, 0, 1])) for _ in range(2)]
        >>> fisher = kdfast.fisher_diagonal(net, batches)
        >>> metric = {name: f / 10 + 1e-3 for name, f in fisher.items()}
        >>> kdfast.grad_norms(net, *batches[0], metric=metric).shape
        torch.Size([5])
    """
    total: dict[str, Tensor] = {}
    for each in batches:
        if not isinstance(each, (tuple, list)) or len(each) not in (2, 3):
            raise UsageError(
                f"`batches` yields a {type(each).__name__}: yield pairs (inputs, labels), or triples with `rows`"
            )
        inputs, labels, rows = (*each, None)[:3]
        objective = Objective(loss, labels, teacher, alpha, temperature, rows=rows, ignore_index=ignore_index)
        batch = make_batch(model, inputs, labels, batch_dim, objective)
        found = evaluate(batch, fallback, partial(_sums_of_squares, backend))
        for name, value in found.values.items():
            if found.scales is not None and batch.n:
                value.mul_(found.scales.max() ** 2)
            total[name] = total[name].add_(value) if name in total else value
    if not total:
        raise UsageError("`batches` is empty: pass at least one batch (an iterator can be read only once)")
    for name, value in total.items():
        if not bool(value.isfinite().all()):
            raise DataError(
                f"the sum of the squared gradients of parameter {name!r} overflows: check for huge "
                "activations, or convert the model and its inputs to float64"
            )
    return total


@full_float32()
def grad_dots(
    model: nn.Module,
    inputs: Any,
    labels: Any,
    vectors: Mapping[str, Tensor],
    *,
    loss: Loss = "cross_entropy",
    teacher: Tensor | TopKTeacher | None = None,
    rows: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 4.0,
    ignore_index: int = -100,
    batch_dim: int = 0,
    fallback: str = "error",
) -> Tensor:
    """Compute the dot product of the gradient of each sample's loss with a given vector.

    With the gradient of a validation loss as the vector, this is the first-order effect of a step on the sample: if it
    is positive, the step lowers the validation loss. Linear and convolution layers take one product of the layer more,
    and form no gradient.

    Args:
        model: As for ``grad_norms``.
        inputs: As for ``grad_norms``.
        labels: As for ``grad_norms``.
        vectors: For each trainable parameter, by its name in ``model.named_parameters()``, a tensor of its shape.
        loss: As for ``grad_norms``.
        teacher: As for ``grad_norms``.
        rows: As for ``grad_norms``.
        alpha: As for ``grad_norms``.
        temperature: As for ``grad_norms``.
        ignore_index: As for ``grad_norms``.
        batch_dim: As for ``grad_norms``.
        fallback: As for ``grad_norms``.

    Returns:
        `(N,)` in float32 (float64 for a model in float64).

    Raises:
        UsageError: If ``vectors`` lacks a parameter, or has others, or as for ``grad_norms``.
        ShapeError: As for ``grad_norms``.
        DataError: If an entry of the vectors is not finite, or as for ``grad_norms``.

    Example:
        >>> net = torch.nn.Linear(12, 3)
        >>> vectors = {name: torch.ones_like(p) for name, p in net.named_parameters()}
        >>> kdfast.grad_dots(net, torch.randn(5, 12), torch.tensor([0, 1, 2, 0, 1]), vectors).shape
        torch.Size([5])
    """
    objective = Objective(loss, labels, teacher, alpha, temperature, rows=rows, ignore_index=ignore_index)
    batch = make_batch(model, inputs, labels, batch_dim, objective)
    parameters = trainable(batch.model)
    check_vectors("vectors", vectors, parameters)
    for name, v in vectors.items():
        if not bool(v.isfinite().all()):
            raise DataError(f"`vectors[{name!r}]` has an entry that is not finite: replace it")
    functional = DotProducts({id(p): vectors[name].detach() for name, p in parameters.items()})
    found = evaluate(batch, fallback, lambda scales: functional)
    products = torch.stack(list(found.values.values())).sum(0)
    return _finite(products if found.scales is None else products * found.scales, found.dtype)


def _norms(squares: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the norms, given the squares of gradients divided by ``scales``.

    Raises:
        DataError: If a norm is not finite.
    """
    return _finite(squares.sqrt() if scales is None else squares.double().sqrt() * scales, dtype)


def _sums_of_squares(backend: str, scales: Tensor | None) -> SumsOfSquares:
    """Return the functional for losses that were divided by ``scales``: relative to the largest of these."""
    if scales is None:
        return SumsOfSquares(backend, None)
    return SumsOfSquares(backend, scales / scales.max().clamp_min(torch.finfo(scales.dtype).tiny))


def _finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values `(N,)` in another dtype.

    Raises:
        DataError: If one is not finite.
    """
    values = values.to(dtype)
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).nonzero()[0])
        raise DataError(
            f"the gradient of sample {bad} is not finite, or its square overflows: check for huge activations, tiny "
            "entries of a metric and huge ones of a vector, or convert the model and its inputs to float64"
        )
    return values
