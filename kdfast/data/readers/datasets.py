"""Indexed data sets, such as torch Datasets, as a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from kdfast.data.source import ArraySplit, Pixels, Source, default_view_spec, infer_class_names
from kdfast.data.views import ViewSpec
from kdfast.errors import DataError


class IndexedDataset(Protocol):
    """Interface of data sets with a length and items (image, label), such as a torch Dataset."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return sample `index` as (image, label)."""


def from_datasets(
    train: IndexedDataset,
    test: IndexedDataset,
    classes: Sequence[str] | None = None,
    *,
    view_spec: ViewSpec | None = None,
) -> Source:
    """Create a source from two indexed data sets, decoded into memory.

    The data sets must not augment or normalize, because kdfast does both. Write data that does not fit in memory to an
    image folder instead.

    Args:
        train: Items (image, label). The image is a PIL image, a uint8 array `(H, W)` or `(H, W, 3)`, a uint8 tensor
            `(1 or 3, H, W)`, or a float tensor of that shape that equals a uint8 tensor / 255. All have one size.
        test: Likewise.
        classes: Class names; None for `0`, `1`, ...
        view_spec: The augmentation; None for shifts (random resized crops from 64 pixels on) without flip.

    Returns:
        The source, its samples in the order of the data sets.

    Raises:
        DataError: Images have another type or different sizes, a label is not a class, or the training set augments
            (its first items differ between two reads).
    """
    for index in range(min(3, len(train))):
        first, second = (_pixels(train[index][0], f"training sample {index}") for _ in range(2))
        if not np.array_equal(first, second):
            raise DataError(f"training sample {index} differs between two reads: pass the data without augmentation")
    splits = [_decode(data, name) for data, name in ((train, "training"), (test, "test"))]
    names = tuple(classes) if classes is not None else infer_class_names(splits[0].labels, "the data sets")
    spec = view_spec or default_view_spec(splits[0].shape, flip=False)
    return Source("datasets", "datasets", names, splits[0], splits[1], spec)


def _decode(data: IndexedDataset, name: str) -> ArraySplit:
    images: list[Pixels] = []
    labels: list[int] = []
    for index in range(len(data)):
        where = f"{name} sample {index}"
        try:
            image, label = data[index]
            labels.append(_label(label))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where} is not a pair of an image and an integer label: {error}") from error
        images.append(_pixels(image, where))
        if images[-1].shape != images[0].shape:
            raise DataError(f"{where} is {images[-1].shape}, sample 0 {images[0].shape}: resize all images to one size")
    if not images:
        raise DataError(f"the {name} data set is empty: pass at least one sample")
    return ArraySplit(np.stack(images), np.asarray(labels, np.int64), f"{name} images")


def _label(label: Any) -> int:
    value = np.asarray(label)
    if value.size != 1 or value.dtype.kind not in "iu":
        raise TypeError(f"the label is {label!r}")
    return int(value.reshape(()))


def _pixels(image: Any, where: str) -> Pixels:
    """Return one image as uint8 (H, W, 3)."""
    if isinstance(image, torch.Tensor):
        array = _tensor_pixels(image, where)
    else:
        if hasattr(image, "convert"):  # a PIL image; importing PIL would require it
            image = image.convert("RGB")
        array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., np.newaxis]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise DataError(
            f"{where} is {array.dtype} of shape {array.shape}: pass uint8 (H, W, 3), a PIL image, or a tensor (3, H, W)"
        )
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)), dtype=np.uint8)


def _tensor_pixels(image: torch.Tensor, where: str) -> np.ndarray[Any, Any]:
    if image.is_floating_point():
        scaled = image.double() * 255
        image = scaled.round()
        # False for NaN too.
        if not bool(((scaled - image).abs() < 1e-3).all() and (image >= 0).all() and (image <= 255).all()):
            raise DataError(f"{where} is a float tensor that is not a uint8 image / 255: pass it before normalization")
        image = image.to(torch.uint8)
    return image.movedim(0, -1).numpy() if image.ndim == 3 else image.numpy()
