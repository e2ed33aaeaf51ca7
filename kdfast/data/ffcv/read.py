"""FFCV's .beton files: reading and loading them. The only file that imports ffcv, and only when it is needed.

FFCV 1.0.2 trusts its caller: a wrong index reads foreign memory, an exception in its thread leaves the main thread
waiting for ever, a half-written file opens. Everything is therefore checked before FFCV sees it, the files by
`kdfast.data.ffcv.format`, and its pipelines only decode; augmentation is by views, whose draws, unlike FFCV's, can be
repeated.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import queue
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.ffcv.format import read_structure
from kdfast.data.source import Pixels, epoch_ids, index_array
from kdfast.data.stateless_random import IntArray
from kdfast.errors import BackendUnavailable, DataError, UsageError

_BATCHES_AHEAD = 3
_READ_BATCH = 1024
_DECODING = threading.Lock()
_INSTALL = (
    "install libopencv-dev, libturbojpeg0-dev and pkg-config, then `pip install 'kdfast[ffcv]'`, or use another data "
    "format"
)


@functools.cache
def load_ffcv() -> ModuleType:
    """Import FFCV on first use; torch's thread count, which that sets to 1, is restored.

    Returns:
        The package `ffcv` with its submodules.

    Raises:
        BackendUnavailable: It is not installed, or a library it needs is not.
    """
    try:
        with _torch_threads_kept():
            import ffcv.loader.epoch_iterator
            import ffcv.writer
    except (ImportError, OSError) as error:
        raise BackendUnavailable(f"betons need FFCV, which does not load here ({error}); {_INSTALL}") from error
    module: ModuleType = ffcv
    return module


def _require_installed() -> None:
    """Say at once that FFCV is missing; importing it, which takes seconds, is left until something is decoded."""
    if importlib.util.find_spec("ffcv") is None:
        raise BackendUnavailable(f"betons need FFCV, which is not installed; {_INSTALL}")


@contextlib.contextmanager
def _torch_threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        # Unconditionally: another thread may have changed the count that new threads start with, which this sets too.
        torch.set_num_threads(threads)


def worker_count(wanted: int | None = None) -> int:
    """Decoding threads: `wanted`, or one per core; at most the cores this process may use, for FFCV fails on more."""
    from numba import config

    allowed = min(len(os.sched_getaffinity(0)), int(config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    return max(1, min(wanted or allowed, allowed))


class BetonSplit:
    """One .beton file of an image field and an integer label field, its structure checked when it is opened.

    Args:
        path: The file.

    Raises:
        BackendUnavailable: FFCV is not installed.
        DataError: The file is missing, truncated, unfinished, or has other fields or images of different sizes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _require_installed()
        self._labels, self._shape = read_structure(self.path)
        self._loader: BetonLoader | None = None

    @property
    def labels(self) -> IntArray:
        """Class of each sample, int64 `(N,)`."""
        return self._labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of every image, `(H, W, 3)`."""
        return self._shape

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, ids: npt.ArrayLike) -> Pixels:
        """Decode the samples `ids`, integers `(n,)`, to uint8 `(n, H, W, 3)`; the first call compiles the decoder."""
        order = index_array(ids, len(self))
        out = np.empty((len(order), *self._shape), np.uint8)
        if not len(order):
            return out
        if self._loader is None:
            self._loader = BetonLoader(self)
        distinct, place = np.unique(order, return_inverse=True)
        decoded = out if len(distinct) == len(order) else np.empty((len(distinct), *self._shape), np.uint8)
        with contextlib.closing(self._loader.batches(distinct, min(_READ_BATCH, len(distinct)))) as batches:
            start = 0
            for batch in batches:
                decoded[start : start + len(batch)] = batch.numpy()
                start += len(batch)
        if not np.array_equal(distinct, order):
            out = decoded[place]
        return out


class BetonLoader:
    """Streams batches of a beton through FFCV's decoding threads.

    Args:
        split: The split.
        workers: Decoding threads; None for one per core. Clamped to the cores this process may use.

    Attributes:
        name: `ffcv`.
        compile_seconds: Time that compiling the decoder took; it is done when the loader is made, once.

    Raises:
        BackendUnavailable: FFCV is not installed.
    """

    name = "ffcv"

    def __init__(self, split: BetonSplit, *, workers: int | None = None) -> None:
        ffcv = load_ffcv()
        self._count = len(split)
        start = time.perf_counter()
        with _torch_threads_kept():
            self._loader: Any = ffcv.loader.Loader(
                str(split.path),
                batch_size=1,
                num_workers=worker_count(workers),
                os_cache=True,
                drop_last=False,
                batches_ahead=_BATCHES_AHEAD,
                pipelines={
                    "image": [ffcv.fields.rgb_image.SimpleRGBImageDecoder(), ffcv.transforms.ToTensor()],
                    "label": None,
                },
            )
            self._warm_up()
        self.compile_seconds = time.perf_counter() - start

    def batches(self, ids: npt.ArrayLike, batch_size: int) -> Generator[Tensor, None, None]:
        """Decode the samples `ids` in their order.

        Args:
            ids: Integers `(n,)`, n >= 1, no id twice; copied, so changing them later has no effect.
            batch_size: Samples per batch; the last batch may be smaller.

        Returns:
            Iterator of uint8 `(b, H, W, 3)` on the CPU. A batch is valid until the next one is asked for: FFCV decodes
            later ones into its memory. Leaving the iterator early stops the threads and frees the buffers.

        Raises:
            SubsetError: See `epoch_ids`.
            UsageError: The loader is closed.
            DataError: Decoding failed.
        """
        if self._loader is None:
            raise UsageError("this loader is closed; make another one")
        return self._epoch(epoch_ids(ids, self._count, batch_size), batch_size)

    def close(self) -> None:
        """Give up the compiled pipeline and the mapped file."""
        self._loader = None

    def _warm_up(self) -> None:
        """Compile by decoding one sample; with the argument types of `batches`, or it would compile again there."""
        for _ in self.batches(np.zeros(1, np.int64), 1):
            pass

    def _epoch(self, order: IntArray, batch_size: int) -> Generator[Tensor, None, None]:
        # FFCV sizes an epoch's buffers by this attribute; the compiled code does not depend on it.
        self._loader.batch_size = batch_size
        threads = torch.get_num_threads()
        epoch = _epoch_class()(self._loader, order)
        try:
            for (batch,) in epoch:
                # FFCV's thread sets torch's thread count when it starts, which is before its first batch.
                if threads:
                    torch.set_num_threads(threads)
                    threads = 0
                yield batch
            if epoch.error is not None:
                raise DataError(f"FFCV could not decode {self._loader.fname}: {epoch.error!r}") from epoch.error
        finally:
            _stop(epoch)
            if threads:
                torch.set_num_threads(threads)


@functools.cache
def _epoch_class() -> type[Any]:
    base = load_ffcv().loader.epoch_iterator.EpochIterator

    class Epoch(base):  # type: ignore[misc, valid-type]
        """FFCV's thread of one epoch, which ends with an error where FFCV's own would leave its reader waiting."""

        error: Exception | None = None

        def run_pipeline(self, *batch: Any) -> Any:
            # One batch at a time takes all decoding threads anyway, and numba's simplest thread pool ends the process
            # when two threads use it at once.
            with _DECODING:
                return super().run_pipeline(*batch)

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # raised again in the reader's thread
                self.error = error
                self.output_queue.put(None)

    return Epoch


def _stop(epoch: Any) -> None:
    """End an epoch's thread, whatever it is doing: no further batches, and room in its queue until it is gone."""
    epoch.iter_ixes = iter(())
    epoch.close()
    while epoch.is_alive():
        with contextlib.suppress(queue.Empty):
            epoch.output_queue.get(timeout=0.01)
