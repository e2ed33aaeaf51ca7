"""Input checks of the softmax head's functions; messages name the argument and the sample."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops._torch_compat import wrapper_fault

__all__ = [
    "Array",
    "Block",
    "as_tensor",
    "check_block",
    "check_finite",
    "check_l2",
    "check_labels",
    "check_positive_l2",
    "check_tensor",
    "check_tol",
    "split_block",
]

Array: TypeAlias = Tensor | npt.NDArray[np.floating] | npt.NDArray[np.integer]
Block: TypeAlias = "tuple[Array, Array | None, Array | None] | tuple[Array, Array | None, Array | None, Array | None]"
Parts: TypeAlias = tuple[Array, Array | None, Array | None, Array | None]

NAMES = ("features", "logits", "labels", "teacher")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATS = "floating-point numbers"


def split_block(block: object, prefix: str) -> Parts:
    """Return the features, logits, labels and teacher logits of a block, None where absent.

    Raises:
        ShapeError: If the block is not a tuple that starts with the features, or a part is no dense tensor or array of
            numbers.
    """
    if not isinstance(block, (tuple, list)) or not 1 <= len(block) <= 4 or block[0] is None:
        raise ShapeError(
            f"a block of `{prefix}features` is not a tuple (features, logits, labels[, teacher]): yield such tuples"
        )
    parts = [*block, None, None, None][:4]
    for name, x in zip(NAMES, parts, strict=True):
        if x is not None:
            _check_part(f"{prefix}{name}", x, integers=name == "labels")
    return parts[0], parts[1], parts[2], parts[3]


def as_tensor(x: Array) -> Tensor:
    """Return ``x`` as a tensor, sharing its memory where possible."""
    if isinstance(x, Tensor):
        return x
    # torch has no read-only tensors, no foreign byte order and no negative strides: such an array is copied, a memory
    # map one tile at a time.
    shares = x.flags.writeable and x.dtype.isnative and all(stride >= 0 for stride in x.strides)
    return torch.from_numpy(x if shares else np.array(x, x.dtype.newbyteorder("="), order="C"))


def check_block(
    parts: Parts, num_features: int, num_classes: int, device: torch.device, needs_logits: bool, prefix: str
) -> None:
    """Raise if a block does not fit the head.

    Raises:
        ShapeError: If a shape or device does not fit, or required logits are missing.
    """
    x, z, y, t = parts
    n = len(x)
    if x.ndim != 2 or x.shape[1] != num_features:
        raise ShapeError(f"`{prefix}features` has shape {tuple(x.shape)}: pass (N, {num_features})")
    if needs_logits and z is None:
        raise ShapeError(f"`{prefix}logits` is missing: pass (N, C) logits along with the features")
    expected: list[tuple[str, Array | None, tuple[int, ...]]] = [("labels", y, (n,)), ("teacher", t, (n, num_classes))]
    if needs_logits:
        expected.append(("logits", z, (n, num_classes)))
    for name, value, shape in expected:
        if value is not None and tuple(value.shape) != shape:
            raise ShapeError(
                f"`{prefix}{name}` has shape {tuple(value.shape)}, but `{prefix}features` has {n} rows"
                f"{'' if len(shape) == 1 else f' and the head {num_classes} classes'}: pass shape {shape}"
            )
    for name, value in zip(NAMES, parts, strict=True):
        if isinstance(value, Tensor) and value.device != device:
            raise ShapeError(
                f"`{prefix}{name}` is on {value.device}, other tensors are on {device}: move them to one device"
            )


def _check_part(name: str, x: object, *, integers: bool) -> None:
    if not isinstance(x, (Tensor, np.ndarray)):
        raise ShapeError(f"`{name}` has type {type(x).__name__}: pass a tensor or a numpy array")
    if isinstance(x, Tensor):
        _check_layout(name, x)
        dtype: Any = x.dtype
    else:
        if isinstance(x, np.ma.MaskedArray):
            raise ShapeError(f"`{name}` is a masked array: remove the masked samples and pass a plain array")
        dtype = _torch_dtype(x)
    if x.ndim == 0:
        raise ShapeError(f"`{name}` is a single number: pass one row per sample")
    number = isinstance(dtype, torch.dtype) and not dtype.is_complex and dtype != torch.bool
    if not number or dtype.is_floating_point == integers:
        raise ShapeError(f"`{name}` has dtype {dtype}: pass {'int64 class ids' if integers else _FLOATS}")


def _torch_dtype(x: npt.NDArray[Any]) -> Any:
    """Return the dtype of the array as a tensor or, if torch has none, that of the array."""
    try:
        return torch.from_numpy(np.empty(0, x.dtype.newbyteorder("="))).dtype
    except TypeError:
        return x.dtype


def _check_layout(name: str, x: Tensor) -> None:
    if fault := wrapper_fault(x):
        raise ShapeError(f"`{name}` {fault}")
    empty = x.is_meta and type(x) is Tensor  # a subclass may hold its values elsewhere
    if x.layout != torch.strided or empty:
        kind = "is on meta, which holds no values" if empty else f"has layout {x.layout}"
        raise ShapeError(f"`{name}` {kind}: pass a dense tensor")


def check_tensor(name: str, x: object, *, floating: bool = True) -> None:
    """Raise a ShapeError if ``x`` is not a dense tensor, or not one of ``FLOAT_DTYPES`` where it must be."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"`{name}` has type {type(x).__name__}: pass a tensor")
    _check_layout(name, x)
    if floating and x.dtype not in FLOAT_DTYPES:
        raise ShapeError(f"`{name}` has dtype {x.dtype}: pass {_FLOATS}")


def check_finite(name: str, value: Tensor, start: int) -> None:
    """Raise a DataError if a row of ``value`` is not finite; its first row is sample ``start``."""
    # A sum is one cheap pass, and rows are searched only if it is not finite. Finite values may overflow a sum, too.
    if bool(value.sum().isfinite()):
        return
    bad = (~value.isfinite()).any(1).nonzero()
    if len(bad):
        raise DataError(
            f"`{name}` of sample {start + int(bad[0])} is not finite: remove such samples, or correct their computation"
        )


def check_labels(name: str, y: Tensor, num_classes: int, start: int) -> tuple[int, int]:
    """Return the smallest and the largest label of ``y`` (n,), whose first one is that of sample ``start``.

    Raises:
        DataError: If a label lies outside [0, num_classes).
    """
    low, high = (int(v) for v in y.aminmax())
    if low < 0 or high >= num_classes:
        sample = start + int(((y < 0) | (y >= num_classes)).nonzero()[0])
        raise DataError(
            f"`{name}` of sample {sample} is {low if low < 0 else high}: {num_classes} logits need labels in "
            f"[0, {num_classes}); correct the labels or pass logits of every class"
        )
    return low, high


def check_l2(l2: float) -> None:
    """Raise a ShapeError if the weight of the penalty is negative or not finite."""
    if not 0 <= l2 < math.inf:
        raise ShapeError(f"`l2` is {l2}: pass a finite number of at least 0")


def check_positive_l2(l2: float) -> None:
    """Raise a ShapeError if the weight of the penalty is not positive and finite, which makes the Hessian singular."""
    if not 0 < l2 < math.inf:
        raise ShapeError(
            f"`l2` is {l2}: must be positive and finite. Without a penalty the Hessian is singular, since adding "
            "the same vector to the weights of every class changes no probability; pass for example 1e-3"
        )


def check_tol(tol: float) -> None:
    """Raise a ShapeError if a tolerance is not positive and finite."""
    if not 0 < tol < math.inf:
        raise ShapeError(f"`tol` is {tol}: pass a positive number")
