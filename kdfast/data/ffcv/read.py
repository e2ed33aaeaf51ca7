"""Read and load FFCV's .beton files. This is the only file that imports ffcv, and it does so on first use.

FFCV 1.0.2 does not check its input: a wrong index reads foreign memory, an exception in its thread makes the main
thread wait forever, and an incomplete file opens. Therefore everything is checked before it reaches FFCV; the files are
checked by `kdfast.data.ffcv.format`. The pipelines only decode. Augmentation uses views, because FFCV's random draws
are not reproducible.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import mmap
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
from kdfast.data.source import Pixels, check_epoch_ids, check_sample_ids
from kdfast.data.stateless_random import IntArray
from kdfast.errors import BackendUnavailable, DataError, UsageError

_BATCHES_AHEAD = 3
_READ_BATCH = 1024
# FFCV maps the file, and what it has read counts as memory of this process, up to 2 MB for an image, as the system may
# map so much at a time. Of files larger than this, the pages are given back after so many images; they stay in the
# system's cache.
_KEPT_FILE, _KEPT_IMAGES = 256 << 20, 256
_DECODING = threading.Lock()
_INSTALL = (
    "install libopencv-dev, libturbojpeg0-dev and pkg-config, then run pip install 'kdfast[ffcv]', or use another data "
    "format"
)


@functools.cache
def load_ffcv() -> ModuleType:
    """Import FFCV, and restore torch's thread count, which the import sets to 1.

    Returns:
        The package `ffcv` with its submodules.

    Raises:
        BackendUnavailable: FFCV or a library it needs is not installed.
    """
    try:
        with _preserved_torch_threads():
            import ffcv.loader.epoch_iterator
            import ffcv.writer
    except (ImportError, OSError) as error:
        raise BackendUnavailable(f".beton files need FFCV, which cannot be imported ({error}); {_INSTALL}") from error
    module: ModuleType = ffcv
    return module


def _require_installed() -> None:
    """Raise if FFCV is missing, without importing it, which takes seconds."""
    if importlib.util.find_spec("ffcv") is None:
        raise BackendUnavailable(f".beton files need FFCV, which is not installed; {_INSTALL}")


@contextlib.contextmanager
def _preserved_torch_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        # Always set it, because another thread may have changed the count for new threads, which this call sets too.
        torch.set_num_threads(threads)


def worker_count(wanted: int | None = None) -> int:
    """Return the number of decoding threads: `wanted` or one per core, limited to the cores of this process.

    FFCV fails with more threads than cores.
    """
    from numba import config

    allowed = min(len(os.sched_getaffinity(0)), int(config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    return max(1, min(wanted or allowed, allowed))


class BetonSplit:
    """Split in a .beton file with an image field and an integer label field, checked when it is opened.

    Args:
        path: The file.

    Raises:
        BackendUnavailable: FFCV is not installed.
        DataError: The file is missing, truncated or unfinished, or has other fields or images of different sizes.
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
        order = check_sample_ids(ids, len(self))
        out = np.empty((len(order), *self._shape), np.uint8)
        if not len(order):
            return out
        if self._loader is None:
            self._loader = BetonLoader(self)
        distinct, positions = np.unique(order, return_inverse=True)
        decoded = out if len(distinct) == len(order) else np.empty((len(distinct), *self._shape), np.uint8)
        with contextlib.closing(self._loader.batches(distinct, min(_READ_BATCH, len(distinct)))) as batches:
            start = 0
            for batch in batches:
                decoded[start : start + len(batch)] = batch.numpy()
                start += len(batch)
        if not np.array_equal(distinct, order):
            out = decoded[positions]
        return out


class BetonLoader:
    """Load batches of a .beton file with FFCV's decoding threads.

    Args:
        split: The split.
        workers: Decoding threads, limited to the cores of this process; None for one per core.

    Attributes:
        name: `ffcv`.
        compile_seconds: Time of compiling the decoder, in seconds; done once, at construction.
        shape: Shape of every image, `(H, W, 3)`.
        table: None, because the images are decoded batch by batch.

    Raises:
        BackendUnavailable: FFCV is not installed.
    """

    name = "ffcv"
    table: Tensor | None = None

    def __init__(self, split: BetonSplit, *, workers: int | None = None) -> None:
        ffcv = load_ffcv()
        self._count = len(split)
        self.shape = split.shape
        self._gives_back = split.path.stat().st_size > _KEPT_FILE
        self._images_read = 0
        start = time.perf_counter()
        with _preserved_torch_threads():
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
            ids: Distinct integers `(n,)`, n >= 1; copied, so later changes have no effect.
            batch_size: Samples per batch; the last batch may be smaller.

        Returns:
            Iterator of uint8 `(b, H, W, 3)` on the CPU. A batch is valid until the next one is requested, because FFCV
            reuses its memory. Leaving the iterator early stops the threads and frees the buffers.

        Raises:
            SubsetError: The ids or the batch size are invalid, see `check_epoch_ids`.
            UsageError: The loader is closed.
            DataError: Decoding failed.
        """
        if self._loader is None:
            raise UsageError("the loader is closed: create another one")
        return self._epoch(check_epoch_ids(ids, self._count, batch_size), batch_size)

    def close(self) -> None:
        """Release the compiled pipeline and the mapped file."""
        self._loader = None

    def _warm_up(self) -> None:
        """Compile by decoding one sample through `batches`; other argument types would be compiled again."""
        for _ in self.batches(np.zeros(1, np.int64), 1):
            pass

    def _epoch(self, order: IntArray, batch_size: int) -> Generator[Tensor, None, None]:
        # FFCV allocates the buffers of an epoch by this attribute; the compiled code does not depend on it.
        self._loader.batch_size = batch_size
        threads = torch.get_num_threads()
        epoch = _epoch_class()(self._loader, order)
        try:
            for (batch,) in epoch:
                # FFCV's thread sets torch's thread count when it starts, before its first batch.
                if threads:
                    torch.set_num_threads(threads)
                    threads = 0
                self._give_back(len(batch))
                yield batch
            if epoch.error is not None:
                raise DataError(f"FFCV could not decode {self._loader.fname}: {epoch.error!r}") from epoch.error
        finally:
            _stop(epoch)
            if threads:
                torch.set_num_threads(threads)

    def _give_back(self, images: int) -> None:
        """Count images that were read, and unmap the pages of a large file if there were many."""
        self._images_read += images
        if self._gives_back and self._images_read >= _KEPT_IMAGES:
            self._loader.memory_manager.context.mmap._mmap.madvise(mmap.MADV_DONTNEED)
            self._images_read = 0


@functools.cache
def _epoch_class() -> type[Any]:
    base = load_ffcv().loader.epoch_iterator.EpochIterator

    class Epoch(base):  # type: ignore[misc, valid-type]
        """FFCV's thread of one epoch, which passes an exception to the reader instead of leaving it waiting."""

        error: Exception | None = None

        def run_pipeline(self, *batch: Any) -> Any:
            # One batch uses all decoding threads, and numba's simplest thread pool ends the process if two threads
            # use it at once.
            with _DECODING:
                return super().run_pipeline(*batch)

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # raised in the reader's thread
                self.error = error
                self.output_queue.put(None)

    return Epoch


def _stop(epoch: Any) -> None:
    """Stop the thread of an epoch in any state: end its batches, and empty its queue until the thread ends."""
    epoch.iter_ixes = iter(())
    epoch.close()
    while epoch.is_alive():
        with contextlib.suppress(queue.Empty):
            epoch.output_queue.get(timeout=0.01)
