"""What a search needs to be given, checked before any work."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError, ShapeError, SubsetError


def check_fraction(fraction: float) -> None:
    """Refuse a share that leaves nothing to learn.

    Raises:
        SubsetError: Not above 0 and below 1.
    """
    if not 0 < fraction < 1:
        raise SubsetError(
            f"fraction {fraction}: a policy is learned for a share above 0 and below 1; with all samples kept there is "
            "nothing to choose"
        )


def check_inputs(logits: Tensor, features: Tensor, labels: IntArray) -> None:
    """Check shapes, dtypes and values.

    Args:
        logits: float32 (N, C).
        features: float32 (N, D).
        labels: int64 (N,).

    Raises:
        ShapeError: Shapes or dtypes do not fit.
        DataError: A number is not finite.
    """
    for name, x in (("logits", logits), ("features", features)):
        if x.dim() != 2 or x.dtype != torch.float32 or len(x) != len(labels) or not x.shape[1]:
            raise ShapeError(
                f"{name} are {x.dtype} of shape {tuple(x.shape)} for {len(labels)} labels: float32 with one row a "
                "training sample is needed; build the cache on the whole training split"
            )
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).any(1).sum())
            raise DataError(f"{name} of {bad} samples are not finite: build the cache again from a sound teacher")
    if labels.ndim != 1 or labels.dtype != np.int64:
        raise ShapeError(f"labels are {labels.dtype} of shape {labels.shape}: int64, one a sample, is needed")


def check_scores(values: NDArray[np.float64], count: int) -> None:
    """Check a score's values.

    Raises:
        DataError: Not one finite number a sample, or all the same.
    """
    if values.shape != (count,):
        raise DataError(f"the score gave shape {values.shape} for {count} samples: one number a sample is needed")
    if not np.isfinite(values).all():
        raise DataError(f"{int((~np.isfinite(values)).sum())} of {count} scores are not finite: use another score")
    if values.min() == values.max():
        raise DataError(f"all {count} scores are {values[0]:.6g}, so ranks say nothing: use another score")


def digest(*parts: object) -> str:
    """SHA-256 (hexadecimal) of arrays, by their bytes, and of other things, by their repr."""
    total = hashlib.sha256()
    for part in parts:
        array = part.numpy() if isinstance(part, Tensor) else part
        if isinstance(array, np.ndarray):
            total.update(f"{array.dtype.str}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).data)
        else:
            total.update(repr(part).encode())
    return total.hexdigest()
