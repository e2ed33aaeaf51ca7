"""Factored per-sample gradients: what one call of a layer contributes to the gradient of one of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "Convolution",
    "DenseGrad",
    "Derived",
    "Embedding",
    "Geometry",
    "GradFactors",
    "OuterProduct",
    "Recomputed",
    "Sizes",
    "sizes_of",
]


class Geometry(NamedTuple):
    """A 2-D convolution; ``pads`` counts the zeros added at the top, bottom, left and right."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    groups: int


@dataclass(frozen=True)
class DenseGrad:
    """The gradients themselves, `(N, ...)`: for biases and the weights of normalization layers."""

    b: Tensor


@dataclass(frozen=True)
class OuterProduct:
    """`G_n = sum_t b[n, t] a[n, t]^T`, with a `(N, T, d)` and b `(N, T, p)`."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Embedding:
    """`G_n = sum_t e_{ids[n, t]} b[n, t]^T`, with ids `(N, T)` int64, b `(N, T, p)`; ``padding_idx`` is skipped."""

    ids: Tensor
    b: Tensor
    num_embeddings: int
    padding_idx: int | None


@dataclass(frozen=True)
class Convolution:
    """The weight gradient of a convolution, with inputs a `(N, C, H, W)` and output gradients b `(N, P, Ho, Wo)`."""

    a: Tensor
    b: Tensor
    geometry: Geometry


@dataclass(frozen=True)
class Recomputed:
    """Gradients that an operation without a formula yields when it runs again on each sample.

    Attributes:
        compute: Returns the gradients `(n, *shape)` of a slice of the samples.
        b: A gradient of its outputs, `(N, ...)`.
        shape: Shape of the parameter.
    """

    compute: Callable[[slice], Tensor]
    b: Tensor
    shape: Sequence[int]


@dataclass(frozen=True)
class Derived:
    """Gradients of a parameter from those of a tensor that was computed from it, such as `1 + weight`.

    Attributes:
        factors: The factors of the computed tensor's gradients.
        shape: Shape of the computed tensor.
        pull: Maps its gradients `(n, *shape)` to those of the parameter.
    """

    factors: DenseGrad | OuterProduct | Embedding | Convolution | Recomputed
    shape: Sequence[int]
    pull: Callable[[Tensor], Tensor]

    @property
    def b(self) -> Tensor:
        """A gradient `(N, ...)`."""
        return self.factors.b


GradFactors = DenseGrad | OuterProduct | Embedding | Convolution | Recomputed | Derived


class Sizes(NamedTuple):
    """Sizes of one sample and one group of a layer.

    Attributes:
        positions: Number T of positions.
        inputs: Length d of the input at one position; for a convolution, of the patch under the kernel.
        outputs: Length p of the output gradient at one position.
        offsets: Number k^2 of kernel offsets.
        phases: Number s^2 of residues of the offsets modulo the stride.
    """

    positions: int
    inputs: int
    outputs: int
    offsets: int = 1
    phases: int = 1


def sizes_of(factors: OuterProduct | Convolution) -> Sizes:
    """Return the sizes that the cost of each algorithm depends on."""
    if isinstance(factors, OuterProduct):
        return Sizes(factors.a.shape[1], factors.a.shape[2], factors.b.shape[2])
    (kh, kw), stride, dilation, _, groups = factors.geometry
    phases = 1
    for k, s, d in zip((kh, kw), stride, dilation, strict=True):
        phases *= len({i * d % s for i in range(k)})
    offsets = kh * kw
    channels, outputs = factors.a.shape[1] // groups, factors.b.shape[1] // groups
    return Sizes(factors.b.shape[2] * factors.b.shape[3], channels * offsets, outputs, offsets, phases)
