"""Products of a whole network's Hessian or Gauss-Newton matrix with vectors, and solves with them.

For `F(theta) = (1/N) sum_i l_i(f(x_i; theta)) + (l2 / 2) ||theta||^2` over the trainable parameters, flattened into one
vector: the Hessian's product is the directional derivative of the gradient, `H v = d/de grad F(theta + e v)`; the
Gauss-Newton matrix is `G = J^T L'' J / N + l2`, with `J` of the outputs and `L''` of the losses in them. All K vectors
share the forward and backward pass: ``vmap`` runs over the tangents alone.

Sources: B. Pearlmutter, *Fast exact multiplication by the Hessian*, 1994; N. Schraudolph, *Fast curvature matrix-vector
products for second-order gradient descent*, 2002.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops.conjugate_gradients import Solution, conjugate_gradients
from kdfast.ops.grad_norms.layers import refuse_batch_statistics
from kdfast.ops.grad_norms.objective import Loss, Objective, check_inputs, joined, logits_of, run, split

__all__ = ["KINDS", "NetworkCurvature", "network_hvp"]

KINDS = ("hessian", "gauss_newton")
Params = dict[str, Tensor]


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
    """The Hessian or Gauss-Newton matrix of the mean loss, times one or K vectors.

    ``NetworkCurvature`` does the same and keeps what was checked, for repeated products and solves.

    Args:
        model: As for ``kdfast.grad_norms``, in eval mode where it has dropout or batch norm.
        inputs: As for ``kdfast.grad_norms``.
        labels: `(N,)` int64; whatever a loss of your own takes.
        v: `(P,)` or `(K, P)`: P trainable parameters, flattened and joined in the order of ``named_parameters``.
        kind: "hessian" or "gauss_newton".
        l2: Weight of the penalty, at least 0.
        loss: As for ``kdfast.grad_norms``; a function gets the outputs (their logits for "gauss_newton") and labels.
        teacher: `(N, C)` logits, for "kd".
        alpha: As in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        batch_size: Samples computed at a time; None: all. Every input as long as the whole batch is split.

    Returns:
        As ``v``.

    Raises:
        UsageError: The model or an option is not as above.
        ShapeError: Shapes do not fit.
        DataError: Inputs, losses or products are not finite, or a label is out of range.

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
    """An operator `v -> H v` on `(K, P)`, as ``kdfast.ops.conjugate_gradients.conjugate_gradients`` takes it.

    Args:
        model: As for ``network_hvp``; its parameters are read at each product.
        inputs: As there.
        labels: As there.
        kind: "gauss_newton", which is positive semi-definite, or "hessian".
        l2: Weight of the penalty; above 0, the Gauss-Newton matrix is positive definite.
        loss: As there.
        teacher: As there.
        alpha: As there.
        temperature: As there.
        batch_size: As there.

    Raises:
        UsageError: As there.
        ShapeError: As there.
        DataError: As there.
    """

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
            raise UsageError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 <= l2 < math.inf:
            raise UsageError(f"l2={l2}: give a number that is at least 0")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size={batch_size}: give at least 1, or None")
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        check_inputs(model, inputs)
        refuse_batch_statistics(model)
        self.kind, self.l2 = kind, l2
        self._model, self._inputs, self._batch_size = model, inputs, batch_size
        # The compiled kd_loss has no second derivative.
        self._objective = Objective(loss, labels, teacher, alpha, temperature, backend="reference")
        with torch.enable_grad():
            outputs = run(model, inputs)
            self._n = len(self._objective.checked(outputs))
        if kind == "gauss_newton":
            logits_of(outputs)
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.size = sum(p.numel() for p in self._named.values())

    def __call__(self, v: Tensor) -> Tensor:
        """`H v` for each of the K rows of v `(K, P)`.

        Raises:
            ShapeError: The vectors do not fit.
            UsageError: The model cannot run under torch.func.
            DataError: A product is not finite.
        """
        p = next(iter(self._named.values()))
        if v.dim() != 2 or v.shape[1] != self.size:
            raise ShapeError(f"v has shape {tuple(v.shape)}: (K, {self.size}) is needed, all trainable parameters")
        if not v.is_floating_point():
            raise ShapeError(f"v is {v.dtype}: give floating-point numbers")
        if v.device != p.device:
            raise UsageError(f"v is on {v.device}, the model on {p.device}: move one of them")
        product = self._hessian if self.kind == "hessian" else self._gauss_newton
        given = v.to(p.dtype)
        out = self._over_batches(lambda *batch: product(given, *batch)).to(v.dtype) + self.l2 * v
        if not bool(out.isfinite().all()):
            raise DataError("a product with the vectors is not finite: look for what overflows in v or in the model")
        return out

    def gradient(self) -> Tensor:
        """The gradient of F, `(P,)`."""
        params = self._parameters()

        def one(batch: Any, objective: Objective) -> Tensor:
            return _flat(grad(lambda q: objective(self._outputs(q, batch)).sum())(params))

        return self._over_batches(one) + self.l2 * _flat(params)

    def solve(self, b: Tensor, *, tol: float = 1e-6, max_iterations: int | None = None) -> Solution:
        """Solve `H x = b` for the K rows of b `(K, P)` by conjugate gradients in lockstep.

        Raises:
            SolveError: The tolerance is not reached, or the matrix has a direction of negative curvature.
        """
        return conjugate_gradients(self, b, tol=tol, max_iterations=max_iterations)

    def _hessian(self, v: Tensor, batch: Any, objective: Objective) -> Tensor:
        params = self._parameters()
        gradient = grad(lambda q: objective(self._outputs(q, batch)).sum())

        def product(row: Tensor) -> Tensor:
            return _flat(jvp(gradient, (params,), (self._unflat(row),))[1])

        return self._mapped(product, v)

    def _gauss_newton(self, v: Tensor, batch: Any, objective: Objective) -> Tensor:
        params = self._parameters()

        def outputs(q: Params) -> Tensor:
            return logits_of(self._outputs(q, batch))

        traced: Any = vjp(outputs, params)
        z, pull = traced
        slope = grad(lambda out: objective(out).sum())

        def product(row: Tensor) -> Tensor:
            direction = jvp(outputs, (params,), (self._unflat(row),))[1]
            return _flat(pull(jvp(slope, (z,), (direction,))[1])[0])

        return self._mapped(product, v)

    def _mapped(self, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        try:
            out: Tensor = vmap(product)(v)
        except RuntimeError as error:
            raise UsageError(f"no product under torch.func (dropout needs model.eval()): {error}") from error
        return out

    def _over_batches(self, compute: Callable[[Any, Objective], Tensor]) -> Tensor:
        total: Tensor | None = None
        with torch.inference_mode(False), torch.no_grad(), _plain_attention():
            for batch, objective in self._batches():
                part = compute(batch, objective)
                total = part if total is None else total + part
        assert total is not None
        return total / self._n

    def _batches(self) -> Iterator[tuple[Any, Objective]]:
        step = self._batch_size or self._n
        if step >= self._n:
            yield self._inputs, self._objective
            return
        names, tensors = split(self._inputs, self._n)
        self._objective.require_rows("batch_size")
        for start in range(0, self._n, step):
            rows = slice(start, start + step)
            yield joined(self._inputs, names, [x[rows] for x in tensors]), self._objective.rows(rows)

    def _outputs(self, params: Params, batch: Any) -> Any:
        fixed = {name: p.detach() for name, p in self._model.named_parameters() if name not in params}
        return run(lambda *a, **k: functional_call(self._model, {**fixed, **params}, a, k), batch)

    def _parameters(self) -> Params:
        return {name: p.detach() for name, p in self._named.items()}

    def _unflat(self, row: Tensor) -> Params:
        pieces = torch.split(row, [p.numel() for p in self._named.values()])
        return {name: x.view(p.shape) for (name, p), x in zip(self._named.items(), pieces, strict=True)}


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by kernels that have a forward derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _flat(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])
