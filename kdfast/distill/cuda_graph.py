"""Steps replayed as CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.distill.batches import Batch
from kdfast.teacher.row_format import map_logits, tensors_of

# Steps of a batch size that run as usual before it is captured: they compile kernels and allocate workspaces.
WARMUP_STEPS = 2


@dataclass(frozen=True)
class _Captured:
    """A graph and the batch that it reads."""

    graph: torch.cuda.CUDAGraph
    batch: Batch


class CapturedStep:
    """Run a step on the GPU as a CUDA graph, with one graph for each batch size.

    The first steps of a batch size run as usual, and so does every step if capturing fails. All of them run in one
    stream, because a graph has to be captured in the stream that the network's gradients were first computed in.

    Args:
        step: Takes a batch; everything that changes from step to step must be on the GPU, and nothing may wait for it.
        device: The GPU.
    """

    def __init__(self, step: Callable[[Batch], None], device: torch.device) -> None:
        self._step = step
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._seen: Counter[int] = Counter()
        self._graphs: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._enabled = True

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Make the stream of the steps the current one."""
        before = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            yield
        before.wait_stream(self._stream)

    def __call__(self, batch: Batch) -> None:
        """Run the step on a batch."""
        size = batch.index.shape[1]
        captured = self._graphs.get(size)
        if captured is None:
            self._seen[size] += 1
            captured = self._capture(batch) if self._enabled and self._seen[size] > WARMUP_STEPS else None
            if captured is None:
                self._step(batch)
                return
            self._graphs[size] = captured
        for target, source in zip(changing_tensors(captured.batch), changing_tensors(batch), strict=True):
            target.copy_(source, non_blocking=True)
        captured.graph.replay()

    def _capture(self, batch: Batch) -> _Captured | None:
        """Record the step without running it; return None, and never try again, if it cannot be recorded."""
        static = clone_changing(batch)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate memory meanwhile: those of the loader, for example.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._step(static)
        except RuntimeError as error:
            self._enabled = False
            warnings.warn(f"kdfast: this step cannot be a CUDA graph, so it is slower: {error}", RuntimeWarning, 2)
            return None
        return _Captured(graph, static)


def changing_tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch that differ from step to step, without those that hold all rows."""
    tensors = [batch.index]
    if not batch.whole_split:
        tensors.append(batch.images)
    if batch.teacher is not None and batch.teacher_rows is None:
        tensors.extend(tensors_of(batch.teacher))
    return tensors


def clone_changing(batch: Batch) -> Batch:
    """Return the batch with the tensors of `changing_tensors` copied."""
    images, teacher = batch.images, batch.teacher
    if not batch.whole_split:
        images = images.clone()
    if teacher is not None and batch.teacher_rows is None:
        teacher = map_logits(Tensor.clone, teacher)
    return dataclasses.replace(batch, index=batch.index.clone(), images=images, teacher=teacher)
