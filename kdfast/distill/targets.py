"""Where the teacher's logits of a batch come from: looked up in a cache, or computed on the same views."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.views import ViewSpec, apply_views
from kdfast.nets.checkpoint import Model
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.rows import TeacherRows, window

# Rows looked up at once: large enough to read the cache in file order, small enough to stay out of the way in memory.
WINDOW_BYTES = 32 << 20


class Targets(Protocol):
    """The teacher's side of a run."""

    name: str

    def begin_epoch(self, ids: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Announce the samples of an epoch and the view slot of each, in the order in which they will come."""

    def batch(self, start: int, images: Tensor, view_ids: Tensor) -> TeacherRows:
        """The teacher's B rows for the batch that begins at position `start` of the announced samples."""


class CachedTargets:
    """Logits looked up in a teacher's cache, a window of the epoch at a time.

    Args:
        cache: The opened cache; it must cover the samples of the run.
        n_views: Views the run draws from.
        view_seed: Seed of their choice.
        device: Device of the student.
    """

    name = "cache"

    def __init__(self, cache: TeacherCache, n_views: int, view_seed: int, device: torch.device) -> None:
        self._cache = cache
        self._n_views, self._view_seed = n_views, view_seed
        self._device = device
        self._rows = max(1, WINDOW_BYTES // cache.row_bytes)
        self._ids = self._slots = np.empty(0, np.int64)
        self._window: TeacherRows = torch.empty(0)
        self._begin = self._end = 0

    def begin_epoch(self, ids: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """See `Targets`."""
        self._ids, self._slots = ids, slots
        self._window, self._begin, self._end = torch.empty(0), 0, 0

    def batch(self, start: int, images: Tensor, view_ids: Tensor) -> TeacherRows:
        """See `Targets`."""
        stop = start + len(images)
        if start < self._begin or stop > self._end:
            self._begin, self._end = start, min(len(self._ids), max(stop, start + self._rows))
            self._window = self._look_up(self._ids[start : self._end], self._slots[start : self._end])
        return window(self._window, start - self._begin, stop - self._begin)

    def _look_up(self, ids: NDArray[np.int64], slots: NDArray[np.int64]) -> TeacherRows:
        columns = self._cache.slots_for(ids, slots, self._n_views, self._view_seed)
        if self._cache.top_k is None:
            return self._cache.lookup(ids, columns).to(self._device)
        return TopKTeacher(*(part.to(self._device) for part in self._cache.lookup_top_k(ids, columns)))


class OnlineTargets:
    """Logits computed by the teacher on the views that the student sees, with the teacher's own normalisation.

    Args:
        model: The teacher; put on the device and into evaluation mode.
        spec: The views of the run.
        device: Device of student and teacher.
    """

    name = "online teacher"

    def __init__(self, model: Model, spec: ViewSpec, device: torch.device) -> None:
        self._net = model.net.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._normalization = model.normalization
        self._spec = spec
        self._ids = np.empty(0, np.int64)

    def begin_epoch(self, ids: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """See `Targets`."""
        self._ids = ids

    def batch(self, start: int, images: Tensor, view_ids: Tensor) -> Tensor:
        """See `Targets`."""
        ids = torch.from_numpy(self._ids[start : start + len(images)])
        with torch.no_grad():
            inputs = apply_views(images, view_ids, self._spec, self._normalization, sample_ids=ids)
            logits: Tensor = self._net(inputs)
        return logits
