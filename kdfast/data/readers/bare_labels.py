"""Labels without images, for scores and subsets of data that kdfast does not read, such as texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy.typing as npt

from kdfast.data.arrays import as_labels
from kdfast.data.source import DataDigest, Source, infer_class_names
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import ViewSpec
from kdfast.errors import DataError

_SHAPE = (1, 1, 3)


class BareLabels:
    """A split of labels alone.

    Args:
        labels: int64 `(N,)`.
    """

    shape = _SHAPE

    def __init__(self, labels: IntArray) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: npt.ArrayLike) -> NoReturn:
        """Raise a DataError: there are no images."""
        raise DataError("these data are labels without images: open the data with kdfast.open_data")


def from_labels(labels: npt.ArrayLike, classes: Sequence[str] | None = None) -> Source:
    """Create a source of labels alone, which can be scored from a teacher's outputs, and pruned.

    Args:
        labels: Integers `(N,)`, classes in [0, C).
        classes: Class names; None for `0`, `1`, ...

    Returns:
        The source. Its fingerprint is that of the labels, and reading its images is a DataError.

    Raises:
        DataError: The labels are no classes.
    """
    values = as_labels(labels)
    names = infer_class_names(values, "`labels`") if classes is None else tuple(classes)
    split = BareLabels(values)
    recorded = DataDigest(len(values), len(names), _SHAPE).finish(values)
    return Source("labels", "labels", names, split, split, ViewSpec("shift", _SHAPE[:2]), recorded)
