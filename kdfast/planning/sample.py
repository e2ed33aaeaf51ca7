"""A part of the data to measure on, and a cache of it that costs nothing."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdfast.data.holdout import SplitPart
from kdfast.data.loaders import Loader, choose_loader, make_loader
from kdfast.data.order import epoch_order
from kdfast.data.source import ArraySplit, Pixels, Source, Split
from kdfast.data.stateless_random import IntArray
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import Dtype, Kind, build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.row_format import TopK

_TEST_IMAGES = 4096
# Of images that are in memory already, as many as a run has, up to this.
_HELD_IMAGES, _HELD_BYTES = 20_000, 256 << 20
_STREAMED = 8  # times as many images, if they are read in the steps and not before


@dataclass(frozen=True)
class Sample:
    """Random images of a data set, read as a run on all of it reads them.

    Attributes:
        source: The data. If a run keeps decoded images in memory, the images alone, numbered from 0; else all of it.
        ids: int64 (n,), the images, ascending.
        loader: Key of the loader of the run.
    """

    source: Source
    ids: IntArray
    loader: str

    @classmethod
    def take(cls, source: Source, loader: str, device: torch.device, *, kept: int, decoded: int) -> Sample:
        """Return a sample of the training split.

        Args:
            source: The data.
            loader: `auto`, or a key of the loaders.
            device: Where to train.
            kept: Images of the run.
            decoded: Images to take if they must be decoded.

        Raises:
            UsageError: As `make_loader`.
        """
        name = choose_loader(source.train, loader, device)
        held = min(_HELD_IMAGES, _HELD_BYTES // int(np.prod(source.train.shape)))
        if name != "resident":  # a loader that reads ahead needs time to settle in an epoch
            decoded *= _STREAMED
        count = min(kept, max(decoded, held if isinstance(source.train, ArraySplit) else 0))
        chosen = np.sort(epoch_order(np.arange(len(source.train), dtype=np.int64), 0, 0)[:count])
        few = SplitPart(source.test, np.arange(min(len(source.test), _TEST_IMAGES), dtype=np.int64))
        digest = hashlib.sha256(chosen.tobytes()).hexdigest()  # of images that no file has; nothing is read for it
        source = dataclasses.replace(source, test=few, recorded=digest)
        if name == "resident":
            part = SplitPart(source.train, chosen)
            return cls(dataclasses.replace(source, train=part), np.arange(count, dtype=np.int64), name)
        return cls(source, chosen, name)

    def open_loader(self, device: torch.device) -> Loader:
        """Return the loader of a run on these images."""
        return make_loader(self.source.train, self.loader, device)


class _Blank:
    """A split with the labels of another one, whose images are black and need not be decoded."""

    def __init__(self, split: Split) -> None:
        self.labels, self.shape = split.labels, split.shape

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: npt.ArrayLike) -> Pixels:
        """Return black images, uint8 `(n, H, W, 3)`."""
        return np.zeros((len(np.asarray(ids)), *self.shape), np.uint8)


class StandIn(nn.Module):
    """A network with outputs of the teacher's shapes at no cost.

    Args:
        features: Inputs of the last layer, D.
        classes: C.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self._width = features
        self.fc = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, h, w)."""
        pixels = images.flatten(1)
        if pixels.shape[1] < self._width:
            pixels = nn.functional.pad(pixels, (0, self._width - pixels.shape[1]))
        logits: Tensor = self.fc(pixels[:, : self._width])
        return logits


def cache_stand_in(
    sample: Sample,
    model: Model,
    folder: Path,
    *,
    features: int,
    views: int,
    dtype: Dtype,
    top_k: TopK | None,
    kind: Kind,
) -> TeacherCache:
    """Return a cache of the sample with rows of the teacher's shape, for what reads a cache.

    Args:
        sample: The images.
        model: The teacher, which does not run.
        folder: The cache's folder.
        features: Width of the teacher's features.
        views: Views of each image.
        dtype: dtype of the rows.
        top_k: Classes to keep, or None.
        kind: Whether the rows are logits or features.
    """
    with torch.random.fork_rng(devices=[]):
        net = StandIn(features, model.classes).eval()
    stand_in = dataclasses.replace(model, net=net, metadata={})
    blank = dataclasses.replace(sample.source, train=_Blank(sample.source.train))
    build_cache(blank, stand_in, folder, ids=sample.ids, n_views=views, dtype=dtype, top_k=top_k, kind=kind)
    return TeacherCache.open(folder, source=sample.source, check_files=False)
