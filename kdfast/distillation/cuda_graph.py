"""Steps replayed as CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdfast.distillation.batches import Batch

# Steps of a batch size that run as usual before it is captured: they compile kernels and allocate workspaces.
WARMUP_STEPS = 2

EXCLUSIVE = threading.RLock()
"""Held by a thread that trains on a GPU for whatever may load code, wait for the whole device, allocate or free memory
of the driver or draw from torch's global generators: for everything but replays.

While one thread records a graph, none of this may happen in another one. A process that trains one network at a time
never waits for it.
"""

_streams = threading.local()


class CapturedStep:
    """Run a step on the GPU as a CUDA graph, with one graph for each batch size.

    Every batch is copied to the same memory, from the first step on: Triton compiles other code for other alignments,
    and no code can be loaded while a step is recorded. The first steps of a batch size run as usual, and so does every
    step if recording fails. All of them must run in one stream, that of `stream`, in which the network's gradients are
    first computed. Threads have streams of their own, so that their graphs run at the same time.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = stream_of_thread(device)
        self._steps: Counter[int] = Counter()
        self._batches: dict[int, Batch] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._enabled = True

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Make the stream of the steps the current one."""
        before = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            # A recording that failed may have left its stream the current one.
            torch.cuda.set_stream(before)
            before.wait_stream(self._stream)

    def __call__(self, batch: Batch, step: Callable[[Batch], None]) -> None:
        """Run the step on a batch.

        Args:
            batch: On the GPU.
            step: Takes a batch, the same function in every call. Everything that changes from step to step must be on
                the GPU, and nothing may wait for it.
        """
        size = batch.index.shape[1]
        with contextlib.nullcontext() if size in self._graphs else EXCLUSIVE:
            own = self._place(batch, size)
            if size not in self._graphs and self._enabled and self._steps[size] >= WARMUP_STEPS:
                self._record(own, size, step)
            self._steps[size] += 1
            if size in self._graphs:
                self._graphs[size].replay()
            else:
                step(own)

    def wait(self) -> None:
        """Wait until the steps are done, without keeping other threads from theirs."""
        self._stream.synchronize()

    def close(self) -> None:
        """Destroy the graphs, which must not wait for the garbage collector in another thread."""
        with EXCLUSIVE:
            self._graphs.clear()
            self._enabled = False

    def _place(self, batch: Batch, size: int) -> Batch:
        """Copy a batch to the memory of its size."""
        own = self._batches.get(size)
        if own is None:
            own = self._batches[size] = clone_changing(batch)
        else:
            for target, source in zip(changing_tensors(own), changing_tensors(batch), strict=True):
                target.copy_(source, non_blocking=True)
        return own

    def _record(self, batch: Batch, size: int, step: Callable[[Batch], None]) -> None:
        """Record the step without running it; if that fails, never try again."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate memory meanwhile: those of the loader, for example.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step(batch)
        except RuntimeError as error:
            self._enabled = False
            warnings.warn(f"kdfast: this step cannot be a CUDA graph, so it is slower: {error}", RuntimeWarning, 2)
        else:
            self._graphs[size] = graph


def stream_of_thread(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of this thread on a GPU. Torch gives out 32 in turn, so that a new one may be in use."""
    found: dict[str, torch.cuda.Stream] = _streams.__dict__
    if str(device) not in found:
        found[str(device)] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return found[str(device)]


def changing_tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch that differ from step to step, without those that hold all rows."""
    tensors = [batch.index]
    if not batch.whole_split:
        tensors.append(batch.images)
    tensors.extend(x for x in (batch.mixing, batch.boxes) if x is not None)
    if batch.teacher is not None and batch.teacher_rows is None:
        tensors.append(batch.teacher)
    return tensors


def clone_changing(batch: Batch) -> Batch:
    """Return the batch with the tensors of `changing_tensors` copied."""
    images, teacher = batch.images, batch.teacher
    if not batch.whole_split:
        images = images.clone()
    if teacher is not None and batch.teacher_rows is None:
        teacher = teacher.clone()
    mixing, boxes = (None if x is None else x.clone() for x in (batch.mixing, batch.boxes))
    index = batch.index.clone()
    return dataclasses.replace(batch, index=index, images=images, teacher=teacher, mixing=mixing, boxes=boxes)
