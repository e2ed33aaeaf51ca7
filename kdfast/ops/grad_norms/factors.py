"""What one call of a layer adds to the per-sample gradients of its parameters, kept in factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Convolution", "Geometry", "Lookup", "Part", "Rows", "Small"]


class Geometry(NamedTuple):
    """A 2-D convolution; ``pads`` are zeros at the top, bottom, left and right."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    groups: int


@dataclass(frozen=True)
class Small:
    """The gradients themselves, `(N, ...)`: biases and the weights of normalisations."""

    grad: Tensor


@dataclass(frozen=True)
class Rows:
    """`G_n = sum_t b[n, t] a[n, t]^T`: a `(N, T, d)`, b `(N, T, p)`."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Lookup:
    """`G_n = sum_t e_{ids[n, t]} b[n, t]^T`: ids `(N, T)` int64, b `(N, T, p)`; rows of ``skipped`` add nothing."""

    ids: Tensor
    b: Tensor
    rows: int
    skipped: int | None


@dataclass(frozen=True)
class Convolution:
    """The weight gradient of a convolution: a `(N, C, H, W)`, b `(N, P, Ho, Wo)`."""

    a: Tensor
    b: Tensor
    geometry: Geometry


Part = Small | Rows | Lookup | Convolution
