"""What a softmax head's functions accept, block by block; messages name the argument and the sample."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError

__all__ = ["Array", "Block", "as_tensor", "check_finite", "check_labels", "check_shapes", "check_tensor", "split_block"]

Array: TypeAlias = Tensor | npt.NDArray[np.floating] | npt.NDArray[np.integer]
Block: TypeAlias = "tuple[Array, Array | None, Array | None] | tuple[Array, Array | None, Array | None, Array | None]"
Parts: TypeAlias = tuple[Array, Array | None, Array | None, Array | None]

NAMES = ("features", "logits", "labels", "teacher")


def split_block(block: object, prefix: str) -> Parts:
    """Features, logits, labels and teacher of a block.

    Raises:
        ShapeError: If it is no tuple of tensors or arrays, features first.
    """
    if not isinstance(block, (tuple, list)) or not 1 <= len(block) <= 4 or block[0] is None:
        raise ShapeError(f"a block of {prefix}features must be a tuple (features, logits, labels[, teacher])")
    parts = [*block, None, None, None][:4]
    for name, x in zip(NAMES, parts, strict=True):
        if x is not None and not isinstance(x, (Tensor, np.ndarray)):
            raise ShapeError(f"{prefix}{name} is a {type(x).__name__}: give a tensor or a numpy array")
    return parts[0], parts[1], parts[2], parts[3]


def as_tensor(x: Array) -> Tensor:
    """A tensor of the same memory where that is possible."""
    if isinstance(x, Tensor):
        return x
    # A read-only mapping is copied, tile by tile: torch has no read-only tensors.
    return torch.from_numpy(x if x.flags.writeable and x.dtype.isnative else np.array(x, x.dtype.newbyteorder("=")))


def check_shapes(
    parts: Parts, features: int, classes: int, device: torch.device, needs_logits: bool, prefix: str
) -> None:
    """Refuses a block that does not fit the head.

    Raises:
        ShapeError: If a shape, a device or a kind of number does not fit, or logits are needed and missing.
    """
    x, z, y, t = parts
    n = len(x)
    if x.ndim != 2 or x.shape[1] != features:
        raise ShapeError(f"{prefix}features have shape {tuple(x.shape)}: (N, {features}) is needed")
    if needs_logits and z is None:
        raise ShapeError(f"{prefix}logits are missing: give (N, C) logits beside the features")
    wanted: list[tuple[str, Array | None, tuple[int, ...]]] = [("labels", y, (n,)), ("teacher", t, (n, classes))]
    if needs_logits:
        wanted.append(("logits", z, (n, classes)))
    for name, value, shape in wanted:
        if value is not None and tuple(value.shape) != shape:
            raise ShapeError(
                f"{prefix}{name} have shape {tuple(value.shape)}, but {prefix}features have {n} rows"
                f"{'' if len(shape) == 1 else f' and the head {classes} classes'}: {shape} is needed"
            )
    for name, value in zip(NAMES, parts, strict=True):
        if value is not None:
            _check_kind(f"{prefix}{name}", as_tensor(value[:0]).dtype, name == "labels")
        if isinstance(value, Tensor) and value.device != device:
            raise ShapeError(
                f"{prefix}{name} are on {value.device}, other tensors on {device}: move them to one device"
            )


def _check_kind(name: str, kind: torch.dtype, integers: bool) -> None:
    if integers and (kind.is_floating_point or kind in (torch.bool, torch.complex64, torch.complex128)):
        raise ShapeError(f"{name} are {kind}: give int64 class numbers")
    if not integers and not kind.is_floating_point:
        raise ShapeError(f"{name} are {kind}: give floating-point numbers")


def check_tensor(name: str, x: object) -> None:
    """Refuses what is no tensor.

    Raises:
        ShapeError: If so.
    """
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is a {type(x).__name__}: give a tensor")


def check_finite(name: str, value: Tensor, start: int) -> None:
    """Refuses what is not finite in rows of which the first is sample ``start``.

    Raises:
        DataError: If there is such a number.
    """
    # The sum finds it in one cheap pass; where it is matters only then. A sum may also overflow by itself.
    if bool(value.sum().isfinite()):
        return
    bad = (~value.isfinite()).any(1).nonzero()
    if len(bad):
        raise DataError(
            f"{name} of sample {start + int(bad[0])} are not finite: remove such samples, or look for what made them"
        )


def check_labels(name: str, y: Tensor, classes: int, start: int) -> tuple[int, int]:
    """The least and the largest label (n,).

    Raises:
        DataError: If one lies outside [0, classes).
    """
    low, high = (int(v) for v in y.aminmax())
    if low < 0 or high >= classes:
        where = start + int(((y < 0) | (y >= classes)).nonzero()[0])
        raise DataError(
            f"{name} of sample {where} is {low if low < 0 else high}: classes of {classes} logits lie in [0, {classes})"
        )
    return low, high
