"""Selection of the algorithm and the backend that compute the norms of per-sample gradients.

A layer's weight gradient for one sample is `G = sum_t b_t a_t^T`, with `T` positions, inputs `a_t` of length `d` and
output gradients `b_t` of length `p` (for a convolution: of one group, with `d` counting the kernel offsets). Three
algorithms compute `||G||^2`; each is listed with its number of multiply-adds:

- ``direct``: form `G` and square it, `T d p`;
- ``gram``: `<A A^T, B B^T>`, `T^2 (d + p)`;
- ``pixel``: the same for a convolution, where `A A^T` is a sum over the kernel offsets of entries of the Gram matrix
  of input *pixels*: `T^2 (s^2 c + p + k^2 / 2)`, with `c` input channels per group, `k^2` offsets, and `s^2` phases of
  the offsets relative to the layer's stride (1 for stride 1; pixels of different phases never meet).

"auto" selects the cheapest. Memory is not a criterion: every algorithm keeps at most one chunk of samples at a time.
What needs the elements of `G`, such as a sum of their squares with weights, is computed by ``direct``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.errors import UsageError
from kdfast.ops.backends import resolve
from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.factors import Convolution, GradFactors, OuterProduct, Sizes, sizes_of

__all__ = [
    "METHODS",
    "estimate_costs",
    "select_algorithm",
    "squared_norms",
    "sums_of_squares",
    "weighted_squared_norms",
]

METHODS = ("auto", "direct", "gram", "pixel")


def squared_norms(factors: GradFactors, method: str = "auto", backend: str = "auto") -> Tensor:
    """Compute `||G_n||^2` of each sample.

    Args:
        factors: Gradient factors in float32 or float64.
        method: One of ``METHODS``; applies to outer products and convolutions.
        backend: "auto", or the name of an implementation in the row "grad_norms" of ``kdfast.ops.backends``; applies
            to the same.

    Returns:
        `(N,)`: in float64 from the compiled kernels, otherwise in the dtype of the factors.

    Raises:
        UsageError: If ``method`` is unknown.
        BackendUnavailable: If a named backend cannot run here.
    """
    if not isinstance(factors, (OuterProduct, Convolution)):
        return reference.squared_norms(factors)
    compiled = _is_compiled(factors, backend)
    algorithm = select_algorithm(sizes_of(factors), method)
    if not compiled:
        return reference.squared_norms(factors, algorithm)
    # Deferred, as below: the compiled extension may be missing.
    from kdfast.ops.grad_norms import native

    return native.squared_norms(factors, algorithm)


def weighted_squared_norms(factors: GradFactors, weights: Tensor, backend: str = "auto") -> Tensor:
    """Compute `sum_j w_j G_nj^2` of each sample.

    Args:
        factors: Gradient factors in float32 or float64.
        weights: `w`, in the shape of the gradient of one sample and the dtype of the factors.
        backend: As for ``squared_norms``.

    Returns:
        `(N,)`: in float64 from the compiled kernels, otherwise in the dtype of the factors.

    Raises:
        BackendUnavailable: If a named backend cannot run here.
    """
    if not isinstance(factors, (OuterProduct, Convolution)) or not _is_compiled(factors, backend):
        return reference.weighted_squared_norms(factors, weights)
    from kdfast.ops.grad_norms import native

    return native.weighted_squared_norms(factors, weights)


def sums_of_squares(factors: GradFactors, shape: Sequence[int], backend: str = "auto") -> Tensor:
    """Compute `sum_n G_n^2`, element by element: ``shape`` in float64.

    Args:
        factors: Gradient factors in float32 or float64.
        shape: Shape of the gradient of one sample.
        backend: As for ``squared_norms``.

    Raises:
        BackendUnavailable: If a named backend cannot run here.
    """
    if not isinstance(factors, (OuterProduct, Convolution)) or not _is_compiled(factors, backend):
        return reference.sums_of_squares(factors, shape)
    from kdfast.ops.grad_norms import native

    return native.sums_of_squares(factors, shape)


def _is_compiled(factors: OuterProduct | Convolution, backend: str) -> bool:
    """Return whether the backend for these factors is compiled.

    Raises:
        BackendUnavailable: If a named backend cannot run here.
    """
    if backend == "auto" and factors.b.dtype == torch.float64:
        backend = "reference"  # no kernel supports float64 by design, so resolve must not warn
    dtype = str(factors.b.dtype).removeprefix("torch.")
    return resolve("grad_norms", factors.b.device.type, dtype, backend) != "reference"


def select_algorithm(sizes: Sizes, method: str = "auto") -> str:
    """Return ``method``, or the cheapest algorithm for "auto".

    Args:
        sizes: Sizes of one sample and group.
        method: One of ``METHODS``.

    Raises:
        UsageError: If ``method`` is unknown.
    """
    if method not in METHODS:
        raise UsageError(f"`method` is {method!r}: choose one of {', '.join(METHODS)}")
    if method != "auto":
        return method
    found = estimate_costs(sizes)
    return min(found, key=lambda name: found[name])


def estimate_costs(sizes: Sizes) -> dict[str, float]:
    """Return the multiply-adds of each algorithm by name."""
    t, d, p, offsets, phases = sizes
    return {
        "direct": t * d * p,
        "gram": t * t * (d + p),
        "pixel": t * t * (phases * d / offsets + p + offsets / 2),
    }
