"""Checks of a search's inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.arrays import as_values
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError, ShapeError, SubsetError
from kdfast.ops.softmax_head.validation import as_tensor as share_memory
from kdfast.pruning.rules.base import FloatArray


def check_fraction(fraction: float) -> None:
    """Raise unless the fraction leaves a choice.

    Raises:
        SubsetError: `fraction` is not above 0 and below 1.
    """
    if not 0 < fraction < 1:
        raise SubsetError(
            f"`fraction` is {fraction}: pass a share above 0 and below 1; with all samples kept there is nothing to "
            "choose"
        )


def check_inputs(logits: Tensor, features: Tensor, labels: IntArray) -> None:
    """Check shapes, dtypes and values.

    Args:
        logits: float32 (N, C).
        features: float32 (N, D).
        labels: int64 (N,).

    Raises:
        ShapeError: A shape or dtype is wrong.
        DataError: A value is not finite.
    """
    for name, x in (("logits", logits), ("features", features)):
        if x.dim() != 2 or x.dtype != torch.float32 or len(x) != len(labels) or not x.shape[1]:
            raise ShapeError(
                f"`{name}` are {x.dtype} of shape {tuple(x.shape)} for {len(labels)} labels: pass floats with one row "
                "per training sample, from a cache of the whole training split"
            )
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).any(1).sum())
            raise DataError(
                f"{name} of {bad} samples are not finite: rebuild the cache from a teacher with finite outputs"
            )


def as_tensor(name: str, values: Tensor | npt.NDArray[Any]) -> Tensor:
    """Return a tensor, in float32 if it holds floating-point numbers; it shares their memory where torch can.

    float16, bfloat16 and float64 are converted, and the outcome is that of the converted numbers. Numbers beyond the
    range of float32 become infinite, and are refused as such.

    Raises:
        ShapeError: It is neither a tensor nor an array of numbers.
    """
    if isinstance(values, Tensor) and values.layout == torch.strided:
        x = values.detach()
        return x.float() if x.is_floating_point() else x
    if isinstance(values, Tensor) or type(values) not in (np.ndarray, np.memmap) or not _is_number(values.dtype):
        raise ShapeError(f"`{name}` are no dense tensor or array of numbers: pass floats (N, ...), one row per sample")
    x = share_memory(values)
    return x.float() if x.is_floating_point() else x


def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fiu" and dtype.itemsize <= 8  # torch has no long double


def check_scores(values: npt.ArrayLike, count: int) -> FloatArray:
    """Return the scores as float64 (N,).

    Raises:
        DataError: They are not one finite number per sample, or all are equal.
    """
    values = as_values(values, count, "scores")
    if values.min() == values.max():
        raise DataError(f"all {count} scores equal {values[0]:.6g}: ranks need different scores; use another score")
    return values
