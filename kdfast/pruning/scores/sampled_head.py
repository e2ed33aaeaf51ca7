"""Influence on a softmax head in large splits: the head and its Hessian come from a sample, the effects from a stream.

The head's loss is a mean over samples, so that a sample of it has nearly the same optimum and curvature. Every sample's
own gradient is exact for this head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.loaders import device_memory
from kdfast.data.stateless_random import IntArray
from kdfast.errors import UsageError
from kdfast.files.arrays import release_pages
from kdfast.ops.float32 import full_float32
from kdfast.ops.softmax_head import head_self_influence
from kdfast.ops.softmax_head.data import HeadData, compute_logits
from kdfast.ops.softmax_head.influence import mean_gradient
from kdfast.ops.softmax_head.kronecker import kronecker_factors, kronecker_self_influence
from kdfast.ops.softmax_head.residuals import LossConfig, residuals
from kdfast.ops.softmax_head.solve import CHOLESKY_LIMIT, HeadSolver, solve_in_float32
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import Float32Array

# Splits of more samples than LARGE are computed from a stratified sample of SAMPLE.
LARGE = 1 << 17
SAMPLE = 1 << 15
# Gradient norm of the head, and relative residual of its solves: far below what another sample would change.
HEAD_TOL = 1e-4
_BLOCK_ROWS = 1 << 13

Rows = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Logits(Protocol):
    """Logits of all samples, read a slice at a time."""

    def __getitem__(self, part: slice, /) -> npt.NDArray[np.float32]:
        """Return those of consecutive samples, (n, C)."""


class HeadBlocks:
    """Features, logits of a head, labels and teacher logits of all samples, a block at a time; read again each time.

    Args:
        features: float32 (N, D); pages of mapped files are released.
        logits: float32 (N, C), the teacher's; an array or what has its slices.
        labels: int64 (N,).
        weights: float64 (C, D + 1) of the head, or None for the teacher's own logits.
        teacher: Whether the blocks hold the teacher's logits.
        device: Where the blocks are computed.
        samples: int64 (n,), ascending: only these, of logits that are an array; None: all.
    """

    def __init__(
        self,
        features: Float32Array,
        logits: Logits,
        labels: IntArray,
        weights: Tensor | None,
        *,
        teacher: bool,
        device: torch.device | str,
        samples: IntArray | None = None,
    ) -> None:
        self._features, self._logits, self._labels = features, logits, labels
        self._weights = None if weights is None else weights.float()
        self._teacher, self._device, self._samples = teacher, device, samples

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._labels if self._samples is None else self._samples)

    def __iter__(self) -> Iterator[Rows]:
        for start in range(0, len(self), _BLOCK_ROWS):
            part: Any = slice(start, start + _BLOCK_ROWS)
            if self._samples is not None:
                part = self._samples[part]
            x, y = self._read(self._features[part]), self._read(self._labels[part])
            t = self._read(self._logits[part]) if self._teacher or self._weights is None else None
            z = t if self._weights is None else compute_logits(x, self._weights, True)
            assert z is not None
            yield x, z, y, t if self._teacher else None
            release_pages(self._features)
            if isinstance(self._logits, np.ndarray):
                release_pages(self._logits)

    def _read(self, rows: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(rows)).to(self._device)


def removal_effects(blocks: HeadBlocks, direction: Tensor, loss: LossConfig) -> FloatArray:
    """Return the residual times the logits of `direction` (C, D + 1) = H^-1 g_val of each sample, float64 (N,)."""
    effects, start = np.empty(len(blocks)), 0
    for x, z, y, teacher in blocks:
        # Residuals of confident samples vanish in float32.
        r = residuals(z.double(), y, None if teacher is None else teacher.double(), loss)
        found = (compute_logits(x, direction.float(), True).double() * r).sum(1)
        effects[start : start + len(x)] = found.cpu().numpy()
        start += len(x)
    return effects


@full_float32()
def removal_direction(rows: tuple[Tensor, Tensor, Tensor], held: HeadBlocks, l2: float, loss: LossConfig) -> Tensor:
    """Return H^-1 g_val (C, D + 1) in float64, from features, logits and labels of training and validation samples."""
    gradient = mean_gradient(HeadData(held, None), LossConfig())
    exact = HeadSolver(HeadData(rows[0], rows[1]), l2, loss, tol=HEAD_TOL, method="cg")
    return solve_in_float32(exact, HeadData(rows[0].float(), rows[1].float()), gradient)


def self_method(classes: int, features: int) -> str:
    """Return the `method` of `head_self_influence` without another choice: exact up to `CHOLESKY_LIMIT` weights."""
    return "cholesky" if classes * (features + 1) <= CHOLESKY_LIMIT else "kronecker"


def exact_method(weights: int, samples: int, processes: int, device: torch.device | str) -> str:
    """Return the `method` of `head_self_influence` with the exact Hessian of a head of any size.

    It is a matrix where it fits. Otherwise there is a solve for every sample, which takes days for a large split.

    Raises:
        UsageError: The matrix takes too much memory for a large split, or for several processes.
    """
    needed, memory = 16 * weights**2, device_memory(torch.device(device))  # with its factor
    if weights <= CHOLESKY_LIMIT or needed <= memory // 2:
        return "cholesky"
    if samples <= LARGE and processes == 1:
        return "cg"
    where = f"{samples} samples" if processes == 1 else "several processes"
    raise UsageError(
        f"option hessian=exact: for {where} the Hessian must be a matrix, which takes {needed / 1e9:,.1f} GB for a "
        f"head of {weights} weights, more than half of the {memory / 1e9:.1f} GB of {device}: use hessian=kronecker"
    )


def streamed_self_influence(
    blocks: HeadBlocks, rows: tuple[Tensor, Tensor, Tensor], l2: float, loss: LossConfig, method: str
) -> FloatArray:
    """Return g^T H^-1 g / N of each sample, float64 (N,); with the method "kronecker" H is that of `rows`."""
    if method == "kronecker":
        factors = kronecker_factors(HeadData(*rows), l2, loss, None, "curvature")
        data = HeadData(blocks, None)
        data.num_rows = len(blocks)
        found = kronecker_self_influence(data, factors, loss, None)
        found = found / len(found)
    else:
        found = head_self_influence(
            blocks, None, None, l2=l2, alpha=loss.alpha, temperature=loss.temperature, method=method
        )
    return np.asarray(found.double().cpu().numpy(), dtype=np.float64)
