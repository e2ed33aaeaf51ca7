"""Decoded images in memory that processes share, in place of a copy in each."""

from __future__ import annotations

import dataclasses
import mmap
import os
import pickle
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdfast.data.loaders import Loader
from kdfast.data.source import ArraySplit, Pixels, Source, Split
from kdfast.data.stateless_random import IntArray


class SharedPixels:
    """Images in anonymous shared memory; a process that is started with this object maps the same pages.

    Args:
        images: uint8 (N, H, W, 3), copied.

    Attributes:
        array: The images, uint8 (N, H, W, 3).
    """

    def __init__(self, images: Pixels) -> None:
        self._shape = images.shape
        self._descriptor = os.memfd_create("kdfast-images")
        os.truncate(self._descriptor, images.nbytes)
        self.array = self._map()
        np.copyto(self.array, images)

    def _map(self) -> Pixels:
        memory = mmap.mmap(self._descriptor, int(np.prod(self._shape)))
        pixels: Pixels = np.frombuffer(memory, np.uint8).reshape(self._shape)
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self._shape, "descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shape, self._descriptor = state["shape"], state["descriptor"].detach()
        self.array = self._map()

    def __del__(self) -> None:
        os.close(self._descriptor)  # the mapping stays for as long as the array


class SharedSplit(ArraySplit):
    """A split whose images are in shared memory.

    Args:
        images: The images.
        labels: int64 (N,).
    """

    def __init__(self, images: SharedPixels, labels: IntArray) -> None:
        super().__init__(images.array, labels, "shared images")
        self._shared = images

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedSplit, (self._shared, self._labels)


def share_source(source: Source, loader: Loader) -> Source | None:
    """Return a source that processes can be started with, whose images are in memory once.

    The given source and its loader use that memory from now on, too.

    Args:
        source: The data.
        loader: Loader of its training images.

    Returns:
        The source; None if its images are not in the memory of the CPU, or not on a system that can share it, so that
        each process must open the data itself.
    """
    if not hasattr(os, "memfd_create"):
        return None
    table = loader.table if loader.table is not None and loader.table.device.type == "cpu" else None
    train = _share(source.train, None if table is None else table.numpy())
    test = _share(source.test)
    if train is None or test is None:
        return None
    if table is not None and isinstance(train, SharedSplit):
        loader.table = torch.from_numpy(train.images)
    return dataclasses.replace(source, train=train, test=test, recorded=source.fingerprint)


def _share(split: Split, decoded: npt.NDArray[np.uint8] | None = None) -> Split | None:
    """Return the split with its images, or those that are decoded already, in shared memory; None if it cannot be."""
    if isinstance(split, ArraySplit):
        shared = SharedSplit(SharedPixels(split.images), split.labels)
        split.images = shared.images
        return shared
    if decoded is not None:
        return SharedSplit(SharedPixels(decoded), split.labels)
    try:
        pickle.dumps(split)  # images on the disk: what is known about them is small
    except Exception:
        return None
    return split
