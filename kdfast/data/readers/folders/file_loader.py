"""A loader of images that are files, decoded by several processes into memory that they share."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.source import Pixels, Split, check_epoch_ids
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError, UsageError

_SLOTS = 3  # the batch in use, and two that are decoded meanwhile
_MOST_PIECE = 32  # images that a process decodes at a time
_ORPHAN_SECONDS = 1.0


def is_files(split: Split) -> bool:
    """Return whether the images of a split are decoded when they are read, each by itself."""
    return bool(getattr(split, "from_files", False))


class FileLoader:
    """Decode batches of image files in several processes, a few batches ahead of their use.

    The processes are forked by the first epoch and serve the later ones. Which of them decodes an image does not show:
    the batches are those that `split.read` returns.

    Args:
        split: The split.
        workers: Processes, limited to the cores of this process, or to its share of them where torchrun starts several;
            None for one per core.

    Attributes:
        name: `files`.
        compile_seconds: 0, because nothing is compiled.
        shape: Shape of every image, `(H, W, 3)`.
        table: None, because the images are decoded batch by batch.
    """

    name = "files"
    compile_seconds = 0.0
    table: Tensor | None = None

    def __init__(self, split: Split, *, workers: int | None = None) -> None:
        # Of the processes that torchrun starts on this machine, each decodes its share of every batch.
        cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.shape = split.shape
        self._split = split
        self._workers = max(1, min(workers or cores, cores))
        self._idle: list[_Workers] = []
        self._closed = False

    def batches(self, ids: npt.ArrayLike, batch_size: int) -> Generator[Tensor, None, None]:
        """Decode the samples `ids` in their order.

        Args:
            ids: Distinct integers `(n,)`, n >= 1; copied, so later changes have no effect.
            batch_size: Samples per batch; the last batch may be smaller.

        Returns:
            Iterator of uint8 `(b, H, W, 3)` on the CPU. A batch is valid until the next one is requested, because its
            memory is used again. Several iterators may be used at a time.

        Raises:
            SubsetError: The ids or the batch size are invalid, see `check_epoch_ids`.
            UsageError: The loader is closed.
            DataError: An image cannot be read, or a process ended.
        """
        if self._closed:
            raise UsageError("the loader is closed: create another one")
        return self._epoch(check_epoch_ids(ids, len(self._split), batch_size), batch_size)

    def close(self) -> None:
        """End the processes and release their memory."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _epoch(self, order: IntArray, batch_size: int) -> Generator[Tensor, None, None]:
        size = min(batch_size, len(order))
        workers = next((x for x in self._idle if x.size >= size), None)
        if workers is not None:
            self._idle.remove(workers)
        else:
            workers = _Workers(self._split, size, self._workers)
        try:
            yield from workers.batches(order, batch_size)
        except BrokenProcessPool as error:
            workers.broken = True
            raise DataError(
                "a process that decodes images has ended, killed perhaps because memory ran out: free some, use a "
                "smaller `batch_size`, or write .beton files with kdfast data convert"
            ) from error
        finally:
            workers.rest()
            if self._closed or workers.broken:
                workers.close()
            else:
                self._idle.append(workers)


@dataclass
class _Workers:
    """Processes and the memory into which they decode.

    Attributes:
        split: What they read.
        size: Images that a slot of the memory holds.
        count: Number of processes.
        broken: Whether one of them has ended, so that none can be used again.
    """

    split: Split
    size: int
    count: int
    broken: bool = False
    _pending: set[Future[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._memory = _shared_pixels(_SLOTS * self.size, self.split.shape)
        self._pool = ProcessPoolExecutor(
            self.count,
            multiprocessing.get_context("fork"),
            initializer=_start,
            initargs=(self.split, self._memory, os.getpid()),
        )

    def batches(self, order: IntArray, batch_size: int) -> Generator[Tensor, None, None]:
        """Yield the batches of an epoch, each when it is decoded."""
        parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        tasks: deque[list[Future[None]]] = deque()
        for index, ids in enumerate(parts):
            # The slot of the batch before is free now.
            while len(tasks) < min(_SLOTS, len(parts) - index):
                ahead = index + len(tasks)
                tasks.append(self._submit(parts[ahead], ahead % _SLOTS))
            for task in tasks.popleft():
                task.result()
            start = index % _SLOTS * self.size
            yield torch.from_numpy(self._memory[start : start + len(ids)])

    def rest(self) -> None:
        """Wait until no process writes to the memory."""
        for task in self._pending:
            task.cancel()
        wait(self._pending)
        self._pending.clear()

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, ids: IntArray, slot: int) -> list[Future[None]]:
        step = min(_MOST_PIECE, -(-len(ids) // self.count))
        self._pending = {task for task in self._pending if not task.done()}
        with warnings.catch_warnings():
            # Python warns of forks beside threads. The processes only decode, with libraries that are loaded already.
            warnings.simplefilter("ignore", DeprecationWarning)
            tasks = [
                self._pool.submit(_decode, slot * self.size + start, ids[start : start + step])
                for start in range(0, len(ids), step)
            ]
        self._pending.update(tasks)
        return tasks


def _shared_pixels(count: int, shape: tuple[int, int, int]) -> Pixels:
    """Return uint8 (count, H, W, 3) in memory that forked processes share; not in /dev/shm, which may be small."""
    size = count * int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, size), np.uint8).reshape(count, *shape)


# Set in each process by `_start`.
_source: tuple[Split, Pixels] | None = None


def _start(split: Split, memory: Pixels, parent: int) -> None:
    """Prepare a process: it ignores Ctrl-C, which the parent handles, and ends with the parent."""
    global _source
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    _source = split, memory
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_ORPHAN_SECONDS)
    os._exit(1)


def _decode(start: int, ids: IntArray) -> None:
    """Decode some samples to their place in the memory, one after another: the other cores have processes, too."""
    assert _source is not None, "set by the initializer"
    split, memory = _source
    for row, index in enumerate(ids, start):
        memory[row] = split.read([index])[0]
