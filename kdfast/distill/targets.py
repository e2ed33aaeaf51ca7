"""Teacher logits of a run's batches: looked up in a cache, or computed by a model on the student's views."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.source import Source
from kdfast.data.views import ViewSpec, apply_views
from kdfast.distill.config import RunConfig
from kdfast.errors import CacheMismatch, UsageError
from kdfast.files import sha256_file
from kdfast.nets.checkpoint import Model
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.row_format import TeacherLogits, slice_rows

# Logits looked up at a time: large enough to read the cache in file order, small enough to need little memory.
WINDOW_BYTES = 32 << 20


class BatchTargets(Protocol):
    """Teacher logits of one run, batch by batch."""

    name: str

    def begin_epoch(self, ids: NDArray[np.int64], view_indices: NDArray[np.int64]) -> None:
        """Start an epoch over these samples, in this order, each with the view of its view index."""

    def batch(self, start: int, images: Tensor, view_ids: Tensor) -> TeacherLogits:
        """Return the teacher's logits for the batch that begins at position `start` of the epoch."""


class CachedTargets:
    """Logits looked up in a teacher's cache, for a window of the epoch at a time.

    Args:
        cache: The opened cache; it must cover the samples of the run.
        n_views: Number of views per sample in the run.
        view_seed: Seed of the run's choice of views.
        device: Device of the student.
    """

    name = "cache"

    def __init__(self, cache: TeacherCache, n_views: int, view_seed: int, device: torch.device) -> None:
        self._cache = cache
        self._n_views, self._view_seed = n_views, view_seed
        self._device = device
        self._rows = max(1, WINDOW_BYTES // cache.row_bytes)
        self._ids = self._view_indices = np.empty(0, np.int64)
        self._window: TeacherLogits = torch.empty(0)
        self._begin = self._end = 0

    def begin_epoch(self, ids: NDArray[np.int64], view_indices: NDArray[np.int64]) -> None:
        """See `BatchTargets`."""
        self._ids, self._view_indices = ids, view_indices
        self._window, self._begin, self._end = torch.empty(0), 0, 0

    def batch(self, start: int, images: Tensor, view_ids: Tensor) -> TeacherLogits:
        """See `BatchTargets`."""
        stop = start + len(images)
        if start < self._begin or stop > self._end:
            self._begin, self._end = start, min(len(self._ids), max(stop, start + self._rows))
            self._window = self._look_up(self._ids[start : self._end], self._view_indices[start : self._end])
        return slice_rows(self._window, start - self._begin, stop - self._begin)

    def _look_up(self, ids: NDArray[np.int64], view_indices: NDArray[np.int64]) -> TeacherLogits:
        cached = self._cache.translate_view_indices(ids, view_indices, self._n_views, self._view_seed)
        if self._cache.top_k is None:
            return self._cache.lookup(ids, cached).to(self._device)
        return TopKTeacher(*(part.to(self._device) for part in self._cache.lookup_top_k(ids, cached)))


class OnlineTargets:
    """Logits computed by the teacher on the views that the student sees, normalized with the teacher's statistics.

    Args:
        model: The teacher. It moves to the device and into evaluation mode.
        spec: The data's set of views.
        device: Device of student and teacher.
    """

    name = "online teacher"

    def __init__(self, model: Model, spec: ViewSpec, device: torch.device) -> None:
        self._net = model.net.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._normalization = model.normalization
        self._spec = spec
        self._ids = np.empty(0, np.int64)

    def begin_epoch(self, ids: NDArray[np.int64], view_indices: NDArray[np.int64]) -> None:
        """See `BatchTargets`."""
        self._ids = ids

    def batch(self, start: int, images: Tensor, view_ids: Tensor) -> Tensor:
        """See `BatchTargets`."""
        ids = torch.from_numpy(self._ids[start : start + len(images)])
        with torch.no_grad():
            inputs = apply_views(images, view_ids, self._spec, self._normalization, sample_ids=ids)
            logits: Tensor = self._net(inputs)
        return logits


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher of a run: a cache, a model to run during training, or neither."""

    cache: TeacherCache | None = None
    model: Model | None = None

    def identity(self) -> dict[str, Any] | None:
        """Return what determines the logits; None without a teacher."""
        if self.cache is not None:
            return {"cache": sha256_file(self.cache.path / "manifest.json"), "digest": self.cache.teacher_digest}
        if self.model is not None:
            statistics = dataclasses.asdict(self.model.normalization)
            return {"net": self.model.name, "digest": self.model.digest, **statistics}
        return None

    def resolve_views(self, config: RunConfig, available: int) -> RunConfig:
        """Return the settings with the number of views per sample and their seed resolved.

        Args:
            config: The settings. `views` 0 means all views of the cache, or of the data without a cache; `view_seed`
                None means the cache's, or 0.
            available: Number of views of the data.

        Raises:
            UsageError: If there are fewer views than requested.
        """
        most, default_seed = (available, 0) if self.cache is None else (self.cache.n_views, self.cache.view_seed)
        if config.views > most:
            if self.cache is None:
                raise UsageError(f"`views` is {config.views}, but the data has {available}: lower it")
            raise UsageError(
                f"`views` is {config.views}, but the cache holds {most} (of {available}): lower it or cache more views"
            )
        view_seed = default_seed if config.view_seed is None else config.view_seed
        return dataclasses.replace(config, views=config.views or most, view_seed=view_seed)

    def open(
        self, source: Source, ids: NDArray[np.int64], config: RunConfig, device: torch.device
    ) -> BatchTargets | None:
        """Return the source of a run's teacher logits; None without a teacher.

        Args:
            source: The data.
            ids: int64 (n,), the samples of the run; a cache must cover them.
            config: The settings, with the views resolved.
            device: Device of the student.

        Raises:
            CacheMismatch: If the cache lacks the views of the run, or is for another temperature.
        """
        seed = config.view_seed or 0
        if self.cache is not None:
            # Raises if the cache was built with another view seed.
            self.cache.translate_view_indices(ids[:1], np.zeros(1, np.int64), config.views, seed)
            _check_temperature(self.cache, config)
            return CachedTargets(self.cache, config.views, seed, device)
        if self.model is not None:
            return OnlineTargets(self.model, source.view_spec, device)
        return None


def _check_temperature(cache: TeacherCache, config: RunConfig) -> None:
    kept = cache.top_k
    if kept is not None and kept.temperature != config.temperature:
        raise CacheMismatch(
            f"{cache.path} holds the {kept.k} most probable classes, and the others summed at temperature "
            f"{kept.temperature:g}, but the run has {config.temperature:g}: pass `temperature` {kept.temperature:g}, "
            "or build a cache for the run's temperature"
        )
