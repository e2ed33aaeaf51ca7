"""What is computed from the per-sample gradients of a parameter: squared norms, sums of squares, or dot products.

Each functional takes gradients as factors, one layer at a time, or, for parameters without a formula, gradients that
have been formed for some samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.dispatch import squared_norms, sums_of_squares, weighted_squared_norms
from kdfast.ops.grad_norms.factors import GradFactors
from kdfast.ops.grad_norms.tied_weights import merge_uses, squared_norms_of_sum
from kdfast.ops.model_inputs import check_plain

__all__ = ["DotProducts", "Functional", "SquaredNorms", "SumsOfSquares", "Weights", "check_vectors", "weights_of"]

Rows = slice | Tensor


class Functional(ABC):
    """A function of the gradients of one parameter.

    Attributes:
        loss_weights: Factors `(N,)` of the losses, which the given factors contain and the given gradients do not; None
            for 1.
    """

    loss_weights: Tensor | None = None

    @abstractmethod
    def zeros(self, parameter: nn.Parameter, n: int) -> Tensor:
        """Return the value for `n` samples whose gradients are zero."""

    @abstractmethod
    def add(self, value: Tensor, parameter: nn.Parameter, grads: Tensor, rows: Rows) -> None:
        """Add the gradients `(m, *shape)` of some samples, which are zero in ``value`` so far."""

    @abstractmethod
    def evaluate(self, parameter: nn.Parameter, uses: Sequence[GradFactors]) -> Tensor:
        """Return the value for the sum of the gradients of all uses of a parameter."""


class Weights(NamedTuple):
    """Factors of the squares of a parameter's gradient: ``values * scale``, split so that squares do not overflow."""

    values: Tensor
    scale: float


class SquaredNorms(Functional):
    """Squared norms `(N,)`.

    Args:
        method: As for ``grad_norms``; without effect if squares are weighted.
        backend: As for ``grad_norms``.
        weights: Factors of the squares, by the parameter's id; None for 1.
    """

    def __init__(self, method: str, backend: str, weights: Mapping[int, Weights] | None = None) -> None:
        self._method, self._backend, self._weights = method, backend, weights

    def zeros(self, parameter: nn.Parameter, n: int) -> Tensor:
        """Return zeros `(n,)`, in float64 if squares are weighted."""
        dtype = torch.promote_types(parameter.dtype, torch.float32) if self._weights is None else torch.float64
        return parameter.new_zeros(n, dtype=dtype)

    def add(self, value: Tensor, parameter: nn.Parameter, grads: Tensor, rows: Rows) -> None:
        """Set the squared norms of some samples."""
        squares = grads.reshape(len(grads), -1).to(value.dtype).square()
        if self._weights is None:
            value[rows] = squares.sum(1)
        else:
            weights = self._weights[id(parameter)]
            value[rows] = torch.mv(squares, weights.values.flatten().to(squares.dtype)) * weights.scale

    def evaluate(self, parameter: nn.Parameter, uses: Sequence[GradFactors]) -> Tensor:
        """Return the squared norms."""
        if self._weights is None:
            return self._of_sum(parameter, uses, None)
        weights = self._weights[id(parameter)]
        return self._of_sum(parameter, uses, weights.values.to(uses[0].b.dtype)).double() * weights.scale

    def _of_sum(self, parameter: nn.Parameter, uses: Sequence[GradFactors], weights: Tensor | None) -> Tensor:
        of_one: Callable[[GradFactors], Tensor] = partial(squared_norms, method=self._method, backend=self._backend)
        if weights is not None:
            of_one = partial(weighted_squared_norms, weights=weights, backend=self._backend)
        if len(uses) == 1:
            return of_one(uses[0])
        return squared_norms_of_sum(uses, parameter.shape, of_one, weights)


class SumsOfSquares(Functional):
    """Sums over the samples of the squares of each element of the gradient: the parameter's shape, in float64.

    Args:
        backend: As for ``grad_norms``.
        loss_weights: Factors `(N,)` of the losses; None for 1.
    """

    def __init__(self, backend: str, loss_weights: Tensor | None) -> None:
        self._backend, self.loss_weights = backend, loss_weights

    def zeros(self, parameter: nn.Parameter, n: int) -> Tensor:
        """Return zeros of the parameter's shape."""
        return parameter.new_zeros(parameter.shape, dtype=torch.float64)

    def add(self, value: Tensor, parameter: nn.Parameter, grads: Tensor, rows: Rows) -> None:
        """Add the squares of some samples."""
        grads = grads.double()
        if self.loss_weights is not None:
            grads = grads * self.loss_weights[rows].view(-1, *[1] * parameter.dim())
        value += grads.square().sum(0)

    def evaluate(self, parameter: nn.Parameter, uses: Sequence[GradFactors]) -> Tensor:
        """Return the sums."""
        merged = merge_uses(uses) if len(uses) > 1 else uses
        if len(merged) == 1:
            return sums_of_squares(merged[0], parameter.shape, self._backend)
        out = self.zeros(parameter, 0)
        for _, grads in reference.iter_materialized(merged, parameter.shape, copies=1):
            out += grads.square().sum(0)
        return out


class DotProducts(Functional):
    """Dot products `(N,)` in float64.

    Args:
        vectors: By the parameter's id, a vector of the parameter's shape.
    """

    def __init__(self, vectors: Mapping[int, Tensor]) -> None:
        self._vectors = vectors

    def zeros(self, parameter: nn.Parameter, n: int) -> Tensor:
        """Return zeros `(n,)`."""
        return parameter.new_zeros(n, dtype=torch.float64)

    def add(self, value: Tensor, parameter: nn.Parameter, grads: Tensor, rows: Rows) -> None:
        """Set the dot products of some samples."""
        value[rows] = torch.mv(grads.reshape(len(grads), -1).double(), self._vectors[id(parameter)].flatten().double())

    def evaluate(self, parameter: nn.Parameter, uses: Sequence[GradFactors]) -> Tensor:
        """Return the dot products."""
        vector = self._vectors[id(parameter)]
        return torch.stack([reference.dot_products(use, vector.to(use.b.dtype)) for use in uses]).sum(0)


def check_vectors(argument: str, vectors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless there is a vector of the parameter's shape for each trainable parameter, and no other.

    Raises:
        UsageError: If names, types or devices do not fit.
        ShapeError: If a shape does not fit.
    """
    if not isinstance(vectors, Mapping):
        raise UsageError(f"`{argument}` is a {type(vectors).__name__}: pass a dict of parameter names and tensors")
    for name in vectors:
        if name not in parameters:
            raise UsageError(f"`{argument}` has an entry for {name!r}, which is no trainable parameter: leave it out")
    for name, p in parameters.items():
        if name not in vectors:
            raise UsageError(
                f"`{argument}` has no entry for parameter {name!r}: pass a tensor of shape {tuple(p.shape)}, or freeze "
                "the parameter with requires_grad_(False)"
            )
        v = vectors[name]
        if not isinstance(v, Tensor) or not v.is_floating_point():
            given = f"of dtype {v.dtype}" if isinstance(v, Tensor) else f"a {type(v).__name__}"
            raise UsageError(f"`{argument}[{name!r}]` is {given}: pass a floating-point tensor")
        check_plain(f"{argument}[{name!r}]", v)
        if v.shape != p.shape:
            raise ShapeError(f"`{argument}[{name!r}]` has shape {tuple(v.shape)}: the parameter has {tuple(p.shape)}")
        if v.device != p.device:
            raise UsageError(f"`{argument}[{name!r}]` is on {v.device}, the model on {p.device}: move one of them")


def weights_of(metric: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[int, Weights]:
    """Return the reciprocals of a metric, by the parameters' ids.

    Raises:
        UsageError: As ``check_vectors``.
        ShapeError: As ``check_vectors``.
        DataError: If an entry is not finite, or not positive.
    """
    check_vectors("metric", metric, parameters)
    found = {}
    for name, p in parameters.items():
        f = metric[name].detach()
        if not f.numel():
            found[id(p)] = Weights(f, 1.0)
            continue
        low, high = (float(end) for end in f.aminmax())
        if not 0 < low <= high < float("inf"):
            bad = f.flatten()[int((~((f > 0) & f.isfinite())).flatten().nonzero()[0])]
            raise DataError(
                f"`metric[{name!r}]` has the entry {float(bad):g}: must be finite and positive; add a small constant"
            )
        # Relative to the middle of their range, so that neither they nor their products with squares overflow.
        middle = low**0.5 * high**0.5
        dtype = torch.promote_types(p.dtype, torch.float32)
        found[id(p)] = Weights((middle / f.to(torch.promote_types(f.dtype, dtype))).to(dtype), 1 / middle)
    return found
