"""Hessian-vector and Gauss-Newton-vector products of a whole network, and linear solves with these matrices.

The objective is `F(theta) = (1/N) sum_i l_i(f(x_i; theta)) + (l2 / 2) ||theta||^2` over the trainable parameters,
flattened into one vector. A Hessian product is the directional derivative of the gradient,
`H v = d/de grad F(theta + e v)` at `e = 0`. The Gauss-Newton matrix is `G = J^T L'' J / N + l2 I`, with `J` the
Jacobian of the outputs and `L''` the Hessian of the losses with respect to them. All K vectors share one forward and
backward pass: ``vmap`` runs over the tangents only. The row of an embedding at its ``padding_idx`` is a constant;
``scale_grad_by_freq`` has no effect, since it changes gradients and not the loss.

Sources: B. Pearlmutter, *Fast exact multiplication by the Hessian*, 1994; N. Schraudolph, *Fast curvature matrix-vector
products for second-order gradient descent*, 2002.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops.conjugate_gradients import Solution, conjugate_gradients
from kdfast.ops.float32 import full_float32
from kdfast.ops.grad_norms.evaluation import make_batch
from kdfast.ops.grad_norms.objective import Loss, Objective, logits_of
from kdfast.ops.model_inputs import (
    batched_tensors,
    call_model,
    replace_tensors,
    unchanged_buffers,
)

__all__ = ["KINDS", "NetworkCurvature", "network_hvp"]

KINDS = ("hessian", "gauss_newton")
Params = dict[str, Tensor]


@full_float32()
def network_hvp(
    model: nn.Module,
    inputs: Any,
    labels: Any,
    v: Tensor,
    *,
    kind: str = "hessian",
    l2: float = 0.0,
    loss: Loss = "cross_entropy",
    teacher: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 4.0,
    batch_size: int | None = None,
) -> Tensor:
    """Multiply one or K vectors by the Hessian or Gauss-Newton matrix of the mean loss.

    For repeated products and solves, use ``NetworkCurvature``, which checks the model and inputs once.

    Args:
        model: As for ``kdfast.grad_norms``; in eval mode if it has dropout or batch norm.
        inputs: As for ``kdfast.grad_norms``.
        labels: `(N,)` int64; for a custom loss, anything it accepts.
        v: `(P,)` or `(K, P)`, with the P trainable parameters flattened and concatenated in the order of
            ``named_parameters``.
        kind: "hessian" or "gauss_newton".
        l2: Weight of the L2 penalty, at least 0.
        loss: As for ``kdfast.grad_norms``; a function receives the outputs (for "gauss_newton", their logits) and the
            labels.
        teacher: The teacher's logits `(N, C)`, for "kd".
        alpha: As in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        batch_size: Number of samples per pass; None for all. Every input as long as the whole batch is split.

    Returns:
        The products, with the shape and dtype of ``v``.

    Raises:
        UsageError: If the model or an option does not meet the requirements above.
        ShapeError: If shapes do not fit.
        DataError: If inputs, losses or products are not finite, or a label is out of range.

    Example:
        >>> net = torch.nn.Linear(4, 3)
        >>> v = torch.randn(2, 15)
        >>> kdfast.network_hvp(net, torch.randn(8, 4), torch.randint(0, 3, (8,)), v, l2=0.1).shape
        torch.Size([2, 15])
    """
    options = {"teacher": teacher, "alpha": alpha, "temperature": temperature, "batch_size": batch_size}
    curvature = NetworkCurvature(model, inputs, labels, kind=kind, l2=l2, loss=loss, **options)  # type: ignore[arg-type]
    return curvature(v if v.dim() == 2 else v.unsqueeze(0)).reshape(v.shape)


class NetworkCurvature:
    """Linear operator `v -> H v` on `(K, P)`, suitable for ``kdfast.ops.conjugate_gradients.conjugate_gradients``.

    Args:
        model: As for ``network_hvp``; its parameters are read at each product.
        inputs: As for ``network_hvp``.
        labels: As for ``network_hvp``.
        kind: "gauss_newton", which is positive semi-definite, or "hessian".
        l2: Weight of the L2 penalty; if positive, the Gauss-Newton matrix is positive definite.
        loss: As for ``network_hvp``.
        teacher: As for ``network_hvp``.
        alpha: As for ``network_hvp``.
        temperature: As for ``network_hvp``.
        batch_size: As for ``network_hvp``.

    Attributes:
        kind: As given.
        l2: As given.
        size: Number P of trainable parameters.

    Raises:
        UsageError: As ``network_hvp``.
        ShapeError: As ``network_hvp``.
        DataError: As ``network_hvp``.
    """

    @full_float32()
    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        labels: Any,
        *,
        kind: str = "gauss_newton",
        l2: float = 0.0,
        loss: Loss = "cross_entropy",
        teacher: Tensor | None = None,
        alpha: float = 0.5,
        temperature: float = 4.0,
        batch_size: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise UsageError(f"`kind` is {kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 <= l2 < math.inf:
            raise UsageError(f"`l2` is {l2}: pass a finite number of at least 0")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"`batch_size` is {batch_size}: pass at least 1, or None")
        # The compiled kd_loss has no second derivative.
        objective = Objective(loss, labels, teacher, alpha, temperature, backend="reference")
        batch = make_batch(model, inputs, labels, 0, objective)
        model = batch.model
        self.kind, self.l2 = kind, l2
        self._model, self._inputs, self._batch_size = model, batch.inputs, batch_size
        self._objective = batch.objective
        with torch.inference_mode(False), torch.enable_grad(), unchanged_buffers(model):
            outputs = call_model(model, batch.inputs)
            self._n = len(self._objective.checked_losses(outputs))
        if kind == "gauss_newton":
            logits_of(outputs)  # raises if the outputs have none
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.size = sum(p.numel() for p in self._named.values())

    @full_float32()
    def __call__(self, v: Tensor) -> Tensor:
        """Return `H v` for each of the K rows of v `(K, P)`.

        Raises:
            ShapeError: If the vectors do not fit the model.
            UsageError: If the model cannot run under torch.func.
            DataError: If a product is not finite.
        """
        p = next(iter(self._named.values()))
        if v.dim() != 2 or v.shape[1] != self.size:
            raise ShapeError(
                f"`v` has shape {tuple(v.shape)}: pass (K, {self.size}), one entry per trainable parameter"
            )
        if not v.is_floating_point():
            raise ShapeError(f"`v` has dtype {v.dtype}: pass a floating-point dtype")
        if v.device != p.device:
            raise UsageError(f"`v` is on {v.device}, the model on {p.device}: move one of them")
        product = self._hessian if self.kind == "hessian" else self._gauss_newton
        given = v.to(p.dtype)
        out = self._mean_over_batches(lambda *batch: product(given, *batch)).to(v.dtype) + self.l2 * v
        if not bool(out.isfinite().all()):
            raise DataError("a product with `v` is not finite: check `v` and the model for values that overflow")
        return out

    @full_float32()
    def gradient(self) -> Tensor:
        """Return the gradient of F, `(P,)`."""
        params = self._parameters()

        def batch_gradient(batch: Any, objective: Objective) -> Tensor:
            return _flatten(grad(lambda q: objective(self._outputs(q, batch)).sum())(params))

        return self._mean_over_batches(batch_gradient) + self.l2 * _flatten(params)

    @full_float32()
    def solve(self, b: Tensor, *, tol: float = 1e-6, max_iterations: int | None = None) -> Solution:
        """Solve `H x = b` for all K rows of b `(K, P)` at once by conjugate gradients.

        Raises:
            SolveError: If the tolerance is not reached, or the matrix has a direction of negative curvature.
        """
        return conjugate_gradients(self, b, tol=tol, max_iterations=max_iterations)

    def _hessian(self, v: Tensor, batch: Any, objective: Objective) -> Tensor:
        params = self._parameters()
        gradient = grad(lambda q: objective(self._outputs(q, batch)).sum())

        def product(row: Tensor) -> Tensor:
            return _flatten(jvp(gradient, (params,), (self._unflatten(row),))[1])

        return self._map_rows(product, v)

    def _gauss_newton(self, v: Tensor, batch: Any, objective: Objective) -> Tensor:
        params = self._parameters()

        def outputs(q: Params) -> Tensor:
            return logits_of(self._outputs(q, batch))

        traced: Any = vjp(outputs, params)
        z, pullback = traced
        loss_grad = grad(lambda out: objective(out).sum())

        def product(row: Tensor) -> Tensor:
            direction = jvp(outputs, (params,), (self._unflatten(row),))[1]
            return _flatten(pullback(jvp(loss_grad, (z,), (direction,))[1])[0])

        return self._map_rows(product, v)

    def _map_rows(self, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        try:
            out: Tensor = vmap(product)(v)
        except RuntimeError as error:
            raise UsageError(f"the model cannot run under torch.func (dropout needs model.eval()): {error}") from error
        return out

    def _mean_over_batches(self, compute: Callable[[Any, Objective], Tensor]) -> Tensor:
        total: Tensor | None = None
        with torch.inference_mode(False), torch.no_grad(), _math_attention(), unchanged_buffers(self._model):
            for batch, objective in self._batches():
                term = compute(batch, objective)
                total = term if total is None else total + term
        assert total is not None
        return total / self._n

    def _batches(self) -> Iterator[tuple[Any, Objective]]:
        step = self._batch_size or self._n
        if step >= self._n:
            yield self._inputs, self._objective
            return
        keys, tensors = batched_tensors(self._inputs, self._n)
        self._objective.require_sliceable_labels("`batch_size`")
        for start in range(0, self._n, step):
            rows = slice(start, start + step)
            yield replace_tensors(self._inputs, keys, [x[rows] for x in tensors]), self._objective.select(rows)

    def _outputs(self, params: Params, batch: Any) -> Any:
        fixed = {name: p.detach() for name, p in self._model.named_parameters() if name not in params}
        with _PlainEmbeddings():
            return call_model(lambda *a, **k: functional_call(self._model, {**fixed, **params}, a, k), batch)

    def _parameters(self) -> Params:
        return {name: p.detach() for name, p in self._named.items()}

    def _unflatten(self, row: Tensor) -> Params:
        pieces = torch.split(row, [p.numel() for p in self._named.values()])
        return {name: x.view(p.shape) for (name, p), x in zip(self._named.items(), pieces, strict=True)}


class _PlainEmbeddings(TorchFunctionMode):
    """Makes embeddings functions of their weights whose derivatives of all orders agree.

    PyTorch's backward pass of an embedding omits the row at ``padding_idx``, divides by frequencies with
    ``scale_grad_by_freq``, and gives a sparse gradient with ``sparse``, while tangents know none of this: products with
    a Hessian would be asymmetric. Here the row of padding is a constant, and the other two options have no effect.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function; an embedding without these options."""
        given = kwargs or {}
        if func not in _EMBEDDINGS:
            return func(*args, **given)
        given = {**dict(zip(_EMBEDDINGS[func], args, strict=False)), **given}
        given.update(scale_grad_by_freq=False, sparse=False)
        padding = given.pop("padding_idx", None)
        out = func(**given)
        if padding is None or (func is torch.embedding and padding < 0):
            return out
        ids, weight = given["input" if func is F.embedding else "indices"], given["weight"]
        padding %= len(weight)
        return torch.where((ids == padding).unsqueeze(-1), weight[padding].detach(), out)


# Names of the arguments by position.
_EMBEDDINGS: dict[Any, tuple[str, ...]] = {
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    torch.embedding: ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"),
}


@contextmanager
def _math_attention() -> Iterator[None]:
    """Use the attention kernels that support forward-mode differentiation."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _flatten(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])
