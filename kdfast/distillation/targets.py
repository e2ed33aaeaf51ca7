"""Teacher logits of a run's batches: looked up in a cache, or computed by a model on the student's views."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.loaders import fits_in_memory
from kdfast.data.source import Source
from kdfast.data.transfer import to_device
from kdfast.data.views import ViewSpec, apply_views
from kdfast.device import autocast, network_dtype
from kdfast.distillation.config import RunConfig
from kdfast.distillation.losses.base import Outputs
from kdfast.distillation.losses.logits.reshaped import Reshaping
from kdfast.distillation.losses.total import Places
from kdfast.distillation.recipe.mixing import mix_images
from kdfast.errors import UsageError
from kdfast.files import sha256_file
from kdfast.nets.checkpoint import Model
from kdfast.nets.taps import TapRecorder
from kdfast.ops.float32 import full_float32
from kdfast.teacher.cache import TeacherCache

# Logits looked up at a time: enough to read the cache in file order, and twice as much needs little memory.
WINDOW_BYTES = 16 << 20


class CachedTargets:
    """Logits looked up in a teacher's cache.

    Resident: all rows of the run are on the device, and a step indexes them in place. Otherwise a window of the epoch
    is looked up at a time, by a thread while the steps use the window before. Of a cache of features, the logits of a
    batch are computed on the device.

    Args:
        cache: The opened cache.
        ids: int64 (n,), the samples of the run; the cache must cover them.
        n_views: Number of views per sample in the run.
        view_seed: Seed of the run's choice of views.
        device: Device of the student.
        temperature: Temperature of the loss, of which a cache of the most probable classes has a tail; None: its only
            one. The other classes share the tail as in the unaugmented image.
        resident: Whether to keep all rows on the device; the first epoch reads them.
        reshaping: Changes the logits of samples; None leaves them as they are.
    """

    name = "cache"

    def __init__(
        self,
        cache: TeacherCache,
        ids: NDArray[np.int64],
        n_views: int,
        view_seed: int,
        device: torch.device,
        *,
        temperature: float | None = None,
        resident: bool = False,
        reshaping: Reshaping | None = None,
    ) -> None:
        self.cache, self._reshaping, self._temperature = cache, reshaping, temperature
        # Logits to reshape are computed by the thread; others on the device, from features that take less to copy.
        self._head = None if cache.head is None or reshaping is not None else cache.head.to(device)
        self._ids = np.sort(ids)
        self._n_views, self._view_seed = n_views, view_seed
        self._device = device
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kdfast-cache")
        self._windows: _Windows | None = None
        self.resident = resident
        self._table: Tensor | None = None

    def rows(self, ids: NDArray[np.int64], view_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of views of samples in the resident table, int64 (n,)."""
        return view_indices * len(self._ids) + np.searchsorted(self._ids, ids)

    def begin_epoch(self, ids: NDArray[np.int64], view_indices: NDArray[np.int64]) -> None:
        """Start an epoch over these samples, in this order, each with the view of its view index."""
        if self.resident:
            self._table = self._read_all() if self._table is None else self._table
        else:
            rows = max(1, WINDOW_BYTES // self.cache.lookup_bytes)
            self._windows = _Windows(
                lambda part: self._look_up(ids[part], view_indices[part]), len(ids), rows, self._reader
            )

    def batch(self, start: int, count: int) -> Tensor:
        """Return the logits for the `count` samples at position `start` of the epoch, or all rows if resident."""
        if self._table is not None:
            return self._table
        assert self._windows is not None, "begin_epoch comes first"
        rows = to_device(self._windows.take(start, count), self._device)
        return rows if self._head is None else self._head.logits(rows)

    def _look_up(self, ids: NDArray[np.int64], view_indices: NDArray[np.int64]) -> Tensor:
        cached = self.cache.translate_view_indices(ids, view_indices, self._n_views, self._view_seed)
        if self.cache.top_k is not None:
            return self.cache.lookup_filled(ids, cached, self._temperature)
        if self._head is not None:
            return self.cache.lookup_rows(ids, cached)
        logits = self.cache.lookup(ids, cached)
        return logits if self._reshaping is None else self._reshaping(logits, ids)

    def _read_all(self) -> Tensor:
        """Read one view of all samples at a time, the order of the rows in the cache."""
        n = len(self._ids)
        table: Tensor | None = None
        for view in range(self._n_views):
            part = self._look_up(self._ids, np.full(n, view, np.int64))
            if table is None:
                table = part.new_empty((n * self._n_views, *part.shape[1:]), device=self._device)
            table[view * n : (view + 1) * n] = part.to(self._device)
        assert table is not None, "a run has at least one view"
        return table


class _Windows:
    """The rows of one epoch, a window at a time.

    Args:
        look_up: Reads the rows of a range of positions.
        count: Positions of the epoch.
        rows: Rows of a window, rounded to whole batches.
        reader: Thread that reads the next window.
    """

    def __init__(self, look_up: Callable[[slice], Tensor], count: int, rows: int, reader: ThreadPoolExecutor) -> None:
        self._look_up, self._count, self._rows, self._reader = look_up, count, rows, reader
        self._range = range(0)
        self._window: Tensor | None = None
        self._next: Future[Tensor] | None = None

    def take(self, start: int, count: int) -> Tensor:
        """Return the rows of a batch; batches come in order."""
        if self._window is None or start + count > self._range.stop:
            self._advance(start, max(count, self._rows // count * count))
            assert self._window is not None
        return self._window[start - self._range.start : start + count - self._range.start]

    def _advance(self, start: int, size: int) -> None:
        stop = min(start + size, self._count)
        if self._next is not None and start == self._range.stop:
            self._window = self._next.result()
        else:
            self._window = self._look_up(slice(start, stop))
        self._range = range(start, stop)
        following = slice(stop, min(stop + size, self._count))
        self._next = self._reader.submit(self._look_up, following) if stop < self._count else None


class CachedFeatures:
    """The classifier's inputs of a run's samples, on the device.

    Args:
        cache: The opened cache; it must cover the samples.
        ids: int64 (n,), the samples of the run.
        device: Device of the student.
    """

    def __init__(self, cache: TeacherCache, ids: NDArray[np.int64], device: torch.device) -> None:
        ordered = np.sort(ids)
        self._ids = torch.from_numpy(ordered).to(device)
        self._features = torch.from_numpy(cache.features()[np.searchsorted(cache.coverage, ordered)]).to(device)

    def take(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the features (B, D) of samples, int64 (B,), as the tap `pooled`."""
        return {"pooled": self._features.index_select(0, torch.searchsorted(self._ids, ids))}


class OnlineTargets:
    """Logits computed by the teacher on the views that the student sees, normalized with the teacher's statistics.

    Args:
        model: The teacher. It moves to the device and into evaluation mode.
        spec: The data's set of views.
        device: Device of student and teacher.
        places: The teacher's activations to return too, by name.
        precision: Arithmetic of the teacher: that of the run, since a teacher in float32 would take longer than the
            student on hardware that multiplies fewer bits faster.
    """

    name = "online teacher"

    def __init__(
        self,
        model: Model,
        spec: ViewSpec,
        device: torch.device,
        places: Places | None = None,
        *,
        precision: str = "fp32",
    ) -> None:
        self._net = model.net.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._normalization = model.normalization
        self._spec = spec
        self._taps = TapRecorder(self._net, places or {})
        self._device, self._precision = device, precision

    @full_float32()
    @torch.no_grad()
    def compute(
        self,
        images: Tensor,
        rows: Tensor | None,
        view_ids: Tensor,
        ids: Tensor,
        boxes: Tensor | None = None,
        mixing: Tensor | None = None,
    ) -> Outputs:
        """Return the outputs for a batch, whose fields these are; see `Batch`."""
        inputs = apply_views(
            images, view_ids, self._spec, self._normalization,
            sample_ids=ids, rows=rows, boxes=boxes, dtype=network_dtype(self._precision),
        )  # fmt: skip
        if mixing is not None:
            inputs = mix_images(inputs, mixing)
        with autocast(self._device, self._precision), self._taps:
            logits = self._net(inputs)
        return Outputs(logits, self._taps.take())


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher of a run: a cache, a model to run during training, or neither.

    Beside a cache, the model is only what the student's predictions are compared with.

    Attributes:
        cache: The cache.
        model: The model.
        runs: Runs that train on the device at a time, and share its memory.
    """

    cache: TeacherCache | None = None
    model: Model | None = None
    runs: int = 1

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
        self,
        source: Source,
        ids: NDArray[np.int64],
        config: RunConfig,
        device: torch.device,
        places: Places | None = None,
    ) -> CachedTargets | OnlineTargets | None:
        """Return the source of a run's teacher logits; None without a teacher.

        Args:
            source: The data.
            ids: int64 (n,), the samples of the run; a cache must cover them.
            config: The settings, with the views resolved.
            device: Device of the student.
            places: The activations that the loss reads of an online teacher.

        Raises:
            CacheMismatch: If the cache lacks the views of the run, is for another temperature, or lacks what the
                reshaping of logits needs.
            UsageError: If logits are to be reshaped without a cache, or images are to be mixed with one.
        """
        seed = config.view_seed or 0
        if config.reshape_logits and self.cache is None:
            raise UsageError(
                "`reshape_logits` changes the logits of a teacher's cache, and this run has none: pass `cache`, of the "
                "whole training split, and an `alpha` above 0, or omit it"
            )
        if config.mixes and self.cache is not None:
            raise UsageError(
                "`mixup` and `cutmix` need the teacher's logits of mixed images, and a cache holds those of single "
                "ones: pass `teacher` instead of `cache`, or omit them"
            )
        if self.cache is not None:
            # Raises if the cache was built with another view seed.
            self.cache.translate_view_indices(ids[:1], np.zeros(1, np.int64), config.views, seed)
            if self.cache.top_k is not None:
                self.cache.top_k.column(config.temperature, self.cache.path)
            size = len(ids) * config.views * self.cache.lookup_bytes
            # On a CPU the file is in memory already, in the system's cache.
            resident = device.type != "cpu" and self.cache.head is None and fits_in_memory(self.runs * size, device)
            reshaping = Reshaping.of_cache(self.cache, source.train.labels) if config.reshape_logits else None
            return CachedTargets(
                self.cache, ids, config.views, seed, device, temperature=config.temperature, resident=resident,
                reshaping=reshaping,
            )  # fmt: skip
        if self.model is not None:
            return OnlineTargets(self.model, source.view_spec, device, places, precision=config.precision)
        return None
