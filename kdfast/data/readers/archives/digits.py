"""scikit-learn's bundled digits: the default data of the demo and the tests."""

from __future__ import annotations

import hashlib

import numpy as np

from kdfast.data.source import ArraySplit, Source
from kdfast.data.views import ViewSpec

NAME = "digits"
_TEST_SHARE = 5  # one in five


def open_digits() -> Source:
    """Read scikit-learn's 1,797 handwritten digits of 8x8 pixels.

    The 17 gray levels are scaled to 0 to 255 and copied to three channels. The bundle has no test split, so the fifth
    of each class with the smallest SHA-256 of `kdfast digits <index>` is the test split, the same on every machine.
    Both splits keep the order of the bundle. Views shift by up to 1 pixel and do not flip.
    """
    from sklearn.datasets import load_digits  # slow to import

    bundle = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    labels = bundle.target.astype(np.int64)
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        members = sorted(np.flatnonzero(labels == digit).tolist(), key=_hash)
        test[members[: len(members) // _TEST_SHARE]] = True
    return Source(
        path=NAME,
        kind=NAME,
        classes=tuple(str(digit) for digit in range(10)),
        train=ArraySplit(images[~test], labels[~test], "digits: training images"),
        test=ArraySplit(images[test], labels[test], "digits: test images"),
        view_spec=ViewSpec(kind="shift", size=(8, 8), pad=1, flip=False),
    )


def _hash(index: int) -> bytes:
    return hashlib.sha256(f"kdfast digits {index}".encode()).digest()
