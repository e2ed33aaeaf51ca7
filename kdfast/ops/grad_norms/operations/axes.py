"""Where a tensor's samples are: a dimension of their own, or the outer part of a flattened one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["SampleAxis", "axis_between", "find_axis"]


class SampleAxis(NamedTuple):
    """A dimension that counts the samples, or `block` consecutive rows for each."""

    dim: int
    block: int = 1

    def split(self, x: Tensor) -> Tensor:
        """Return a tensor whose dimension ``dim`` counts the samples alone; the rows of a block come next."""
        return x if self.block == 1 else x.reshape(*x.shape[: self.dim], -1, self.block, *x.shape[self.dim + 1 :])

    def first(self, x: Tensor) -> Tensor:
        """Return a tensor with the samples in the first dimension."""
        return self.split(x).movedim(self.dim, 0)


def find_axis(shape: Sequence[int], n: int) -> SampleAxis | None:
    """Return the first dimension of length `n`."""
    return next((SampleAxis(dim) for dim, length in enumerate(shape) if length == n), None)


def axis_between(shape: Sequence[int], other: Sequence[int], n: int, m: int) -> SampleAxis | None:
    """Return where the samples are in a tensor that has one shape for `n` samples and another for `m`."""
    if len(shape) != len(other):
        return None
    different = [dim for dim, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    if len(different) != 1:
        return None
    dim = different[0]
    block, rest = divmod(shape[dim], n)
    return SampleAxis(dim, block) if block and not rest and other[dim] == block * m else None
