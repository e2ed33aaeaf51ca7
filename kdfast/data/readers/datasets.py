"""Indexed data sets, such as torch or Hugging Face Datasets, as a source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kdfast.data.readers.pixels import ValueRange, to_pixels
from kdfast.data.source import ArraySplit, Pixels, Source, default_view_spec, infer_class_names
from kdfast.data.views import ViewSpec
from kdfast.errors import DataError, UsageError

# Keys of items that are dicts, as public data sets have them.
IMAGE_KEYS = ("image", "img", "pixel_values", "jpg", "png")
LABEL_KEYS = ("label", "labels", "target", "cls")

_COMPARED = 3  # samples that are read twice


class IndexedDataset(Protocol):
    """Interface of data sets with a length and items (image, label), such as a torch Dataset; or items {...}."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return sample `index`."""


def from_datasets(
    train: IndexedDataset,
    test: IndexedDataset,
    classes: Sequence[str] | None = None,
    *,
    view_spec: ViewSpec | None = None,
    value_range: ValueRange | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> Source:
    """Create a source from two indexed data sets, decoded into memory.

    The data sets must not augment or normalize, because kdfast does both. Write data that does not fit in memory to an
    image folder instead.

    Args:
        train: Items (image, label), or dicts as of Hugging Face Datasets. The image is a PIL image, a uint8 array
            `(H, W)` or `(H, W, 3)`, a uint8 tensor `(1 or 3, H, W)`, or a float tensor of that shape that equals a
            uint8 tensor / 255. All have one size.
        test: Likewise.
        classes: Class names; None for those that the data sets declare (`classes`, or the `ClassLabel` of `features`),
            or else `0`, `1`, ...
        view_spec: The augmentation; None for shifts without flip, from 64 pixels on random resized crops with flip.
        value_range: Values of black and white in images that are not uint8, such as 16-bit PIL images and float
            arrays: they are scaled to 0 to 255 and rounded. None: such images are refused.
        image_key: Key of the image in items that are dicts; None: the only one of `IMAGE_KEYS`.
        label_key: Key of the label; None: the only one of `LABEL_KEYS`.

    Returns:
        The source, its samples in the order of the data sets.

    Raises:
        DataError: Images have another type or different sizes, a label is not a class, the data sets declare different
            classes, or the training set augments (its first items differ between two reads).
        UsageError: `value_range` is not two increasing numbers.
    """
    if value_range is not None and not (all(map(math.isfinite, value_range)) and value_range[0] < value_range[1]):
        raise UsageError(f"`value_range` is {value_range}: pass the values of black and white, the first smaller")
    splits = [
        _Items(data, name, value_range, image_key, label_key) for data, name in ((train, "training"), (test, "test"))
    ]
    for index in range(min(_COMPARED, len(train))):
        first, second = (splits[0].read(index)[0] for _ in range(2))
        if not np.array_equal(first, second):
            raise DataError(f"training sample {index} differs between two reads: pass the data without augmentation")
    declared = [items.class_names() for items in splits]
    if None not in declared and declared[0] != declared[1]:
        raise DataError(
            f"the training data has the classes {_shortened(declared[0])}, the test data {_shortened(declared[1])}: "
            "pass data sets whose labels have the same meaning"
        )
    names = tuple(classes) if classes is not None else declared[0]
    train_split, test_split = (items.decode() for items in splits)
    if names is None:
        names = infer_class_names(train_split.labels, "the data sets")
    spec = view_spec or default_view_spec(train_split.shape, flip=False)
    return Source("datasets", "datasets", names, train_split, test_split, spec)


class _Items:
    """The samples of an indexed data set.

    Raises:
        DataError: It has no length or no items by index, is empty, or holds several splits.
    """

    def __init__(
        self,
        data: IndexedDataset,
        name: str,
        value_range: ValueRange | None,
        image_key: str | None,
        label_key: str | None,
    ) -> None:
        self._data = data
        self._name = name
        self._value_range = value_range
        if isinstance(data, Mapping):
            keys = ", ".join(map(str, data))
            raise DataError(f"the {name} data is a dict of {keys}: pass one of its splits")
        try:
            count = len(data)
        except TypeError as error:
            raise DataError(f"the {name} data set has no length: pass one that is indexed, not a stream") from error
        if not count:
            raise DataError(f"the {name} data set is empty: pass at least one sample")
        try:
            first = data[0]
        except (NotImplementedError, TypeError) as error:
            # Loaders have no items; those of torch's IterableDataset are not implemented.
            if isinstance(error, TypeError) and hasattr(data, "__getitem__"):
                raise
            raise DataError(
                f"the {name} data, a {type(data).__name__}, has no items by index: pass a data set that is indexed, "
                "not a stream or a loader"
            ) from error
        self._keys = self._find_keys(first, image_key, label_key)

    def read(self, index: int) -> tuple[Pixels, int]:
        """Return one sample: its pixels, uint8 `(H, W, 3)`, and its label."""
        where = f"{self._name} sample {index}"
        try:
            item = self._data[index]
            image, label = item if self._keys is None else (item[key] for key in self._keys)
            label = _label(label)
        except (TypeError, ValueError, KeyError) as error:
            raise DataError(f"{where} is not a pair of an image and an integer label: {error}") from error
        return to_pixels(image, where, self._value_range), label

    def decode(self) -> ArraySplit:
        """Read all samples."""
        images: list[Pixels] = []
        labels: list[int] = []
        for index in range(len(self._data)):
            image, label = self.read(index)
            labels.append(label)
            images.append(image)
            if image.shape != images[0].shape:
                raise DataError(
                    f"{self._name} sample {index} is {image.shape}, sample 0 {images[0].shape}: resize all images to "
                    "one size"
                )
        return ArraySplit(np.stack(images), np.asarray(labels, np.int64), f"{self._name} images")

    def class_names(self) -> tuple[str, ...] | None:
        """Return the class names that the data set declares, or None."""
        names = getattr(self._data, "classes", None)
        if self._keys is not None:
            features = getattr(self._data, "features", None)
            feature = features.get(self._keys[1]) if isinstance(features, Mapping) else None
            names = getattr(feature, "names", names)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
        return None

    def _find_keys(self, item: Any, image_key: str | None, label_key: str | None) -> tuple[str, str] | None:
        """Return the keys of image and label in a dict; None for other items."""
        if not isinstance(item, Mapping):
            return None
        found = []
        for name, given, usual in (("image_key", image_key, IMAGE_KEYS), ("label_key", label_key, LABEL_KEYS)):
            keys = [key for key in ((given,) if given is not None else usual) if key in item]
            if len(keys) != 1:
                raise DataError(f"{self._name} sample 0 has the keys {', '.join(map(str, item))}: pass `{name}`")
            found.append(keys[0])
        return found[0], found[1]


def _label(label: Any) -> int:
    value = np.asarray(label)
    if value.size != 1 or value.dtype.kind not in "iu":
        raise TypeError(f"the label is {label!r}, not the number of a class")
    return int(value.reshape(()))


def _shortened(names: tuple[str, ...] | None) -> str:
    shown = names or ()
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
