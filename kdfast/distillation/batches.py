"""Batches of a run: which samples are in it, their views, images and teacher logits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.loaders import Loader
from kdfast.data.order import batch_count, epoch_order, split_batches_by_rank
from kdfast.data.transfer import Transfer, to_device
from kdfast.data.views import ViewSpec, draw_view_indices, view_boxes, view_table
from kdfast.distillation.recipe.mixing import Mixing
from kdfast.distillation.targets import CachedTargets
from kdfast.distributed.group import Distributed

_TABLE_ROWS = 1 << 15


@dataclass(frozen=True)
class Batch:
    """Input of one step; every tensor but one is on the device of the training.

    Attributes:
        index: int64 (2, B): sample ids and view ids; (3, B) with the teacher's rows if `teacher` holds all rows.
        images: uint8. All images of the training split, (N, H, W, 3), if they are in the device's memory; else those
            of the batch, (B, H, W, 3), valid until the next batch is requested.
        whole_split: Whether `images` are all images.
        teacher: The teacher's logits, (M, C): all rows of the run, or those of the batch; None without a cache.
        index_on_cpu: `index` on the CPU, where some views are drawn.
        mixing: How the images are mixed, float32 (7,), as in `Mixing.draw`; None: they are not.
        leading: How many of the first columns of `index` are of samples that others are mixed with, and that another
            process trains on.
        boxes: The boxes of the views, int32, one for each column of `index`, as `view_boxes` draws them; None for
            views without boxes.
    """

    index: Tensor
    images: Tensor
    whole_split: bool
    teacher: Tensor | None
    index_on_cpu: Tensor
    mixing: Tensor | None = None
    leading: int = 0
    boxes: Tensor | None = None

    def view_arguments(self, spec: ViewSpec) -> tuple[Tensor, Tensor]:
        """Return sample ids and view ids on the device where `apply_views` needs them for this set of views."""
        index = self.index_on_cpu if spec.is_drawn and self.boxes is None else self.index
        return index[0], index[1]

    @property
    def ids(self) -> Tensor:
        """int64 (B,), indices into the training split."""
        return self.index[0, self.leading :]

    @property
    def view_ids(self) -> Tensor:
        """int64 (B,), the view of each sample."""
        return self.index[1]

    @property
    def image_rows(self) -> Tensor | None:
        """int64, rows of `images`, with the leading ones; None for row i."""
        return self.index[0] if self.whole_split else None

    @property
    def teacher_rows(self) -> Tensor | None:
        """int64 (B,), rows of `teacher`; None for row i."""
        return self.index[2] if len(self.index) == 3 else None


@dataclass(frozen=True)
class _Epoch:
    """One epoch in the order of its samples.

    Attributes:
        ids: int64 (n,), sample ids.
        view_indices: int64 (n,), positions among the views of the run.
        index: int64 (2, n) or (3, n), as in `Batch`, on the CPU.
        sizes: Samples of each batch.
        mixing: float32 (batches, 7), as in `Mixing.draw`; None: the images are not mixed.
        boxes: int32 (n, 5), of the views; None for views without boxes.
    """

    ids: NDArray[np.int64]
    view_indices: NDArray[np.int64]
    index: Tensor
    sizes: list[int]
    mixing: Tensor | None
    boxes: Tensor | None


class Batches:
    """The seeded batches of a run over a subset.

    Args:
        ids: int64 (n,), the kept samples.
        loader: Loader of the images.
        spec: The data's set of views.
        n_views: Number of views per sample.
        view_seed: Seed of the choice of views.
        targets: Cached logits of the teacher, or None.
        batch_size: Samples per batch; the last batch of an epoch may be smaller.
        seed: Seed of the order and the views.
        device: Where the batches go.
        distributed: This process among those of the run; each gets its share of every batch.
        mixing: How images are mixed; None: they are not.
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        loader: Loader,
        spec: ViewSpec,
        *,
        n_views: int,
        view_seed: int,
        targets: CachedTargets | None,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        distributed: Distributed | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        self._mixing = mixing
        self._spec = spec
        self._ids = np.sort(ids)
        self._loader, self._targets = loader, targets
        self._n_views, self._batch_size, self._seed = n_views, batch_size, seed
        self._device = torch.device(device)
        self._distributed = distributed or Distributed()
        # With all views, a view index is the view id itself.
        self._table = None if n_views == spec.count else _view_table(spec, view_seed, self._ids, n_views)
        self._planner: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[_Epoch]] | None = None

    @property
    def per_epoch(self) -> int:
        """Batches per epoch."""
        return batch_count(len(self._ids), self._batch_size)

    def global_size(self, step: int) -> int:
        """Return the number of samples in the batch of a step, over all processes."""
        last = (step + 1) % self.per_epoch == 0
        return len(self._ids) - (self.per_epoch - 1) * self._batch_size if last else self._batch_size

    def epoch(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        """Yield this process's share of the batches of one epoch, starting with batch `first`."""
        plan = self._take_plan(epoch, first)
        index = to_device(plan.index, self._device)
        if self._targets is not None:
            self._targets.begin_epoch(plan.ids, plan.view_indices)
        boxes = None if plan.boxes is None else to_device(plan.boxes, self._device)
        mixing = itertools.repeat(None) if plan.mixing is None else to_device(plan.mixing, self._device)
        stops = list(itertools.accumulate(plan.sizes))
        for images, stop, size, mixed in zip(self._images(plan), stops, plan.sizes, mixing, strict=False):
            teacher = None if self._targets is None else self._targets.batch(stop - size, size)
            part = slice(stop - size, stop)
            whole = self._loader.table is not None
            leading = int(plan.mixing is not None and self._distributed.world_size > 1)
            boxed = None if boxes is None else boxes[part]
            yield Batch(index[:, part], images, whole, teacher, plan.index[:, part], mixed, leading, boxed)

    def _images(self, plan: _Epoch) -> Generator[Tensor, None, None]:
        table = self._loader.table
        if table is not None:
            yield from itertools.repeat(table, len(plan.sizes))
            return
        transfer = Transfer(self._device)
        for images in self._loader.batches(plan.ids, plan.sizes[0]):
            yield transfer(images)

    def _take_plan(self, epoch: int, first: int) -> _Epoch:
        """Return the plan of an epoch, and let a thread make that of the next, so that no step waits for it."""
        if self._next is not None and self._next[0] == epoch and first == 0:
            plan = self._next[1].result()
        else:
            plan = self._plan(epoch, first)
        self._planner = self._planner or ThreadPoolExecutor(1, thread_name_prefix="kdfast-epoch")
        self._next = (epoch + 1, self._planner.submit(self._plan, epoch + 1, 0))
        return plan

    def _plan(self, epoch: int, first: int) -> _Epoch:
        order = epoch_order(self._ids, self._seed, epoch)
        rank, world = self._distributed.rank, self._distributed.world_size
        split = functools.partial(split_batches_by_rank, order, self._batch_size, start=first, world=world)
        shares = list(split(rank=rank))
        if self._mixing is not None and world > 1:
            # The first sample is mixed with the one before it in the whole batch, which is the last for process 0.
            before = split(rank=(rank - 1) % world)
            shares = [np.concatenate([other[-1:], own]) for other, own in zip(before, shares, strict=True)]
        ids = np.concatenate(shares)
        view_indices = draw_view_indices(self._seed, epoch, ids, self._n_views)
        view_ids = self._view_ids(ids, view_indices)
        rows = [ids, view_ids]
        if self._targets is not None and self._targets.resident:
            rows.append(self._targets.rows(ids, view_indices))
        sizes = [len(share) for share in shares]
        boxes = view_boxes(self._spec, ids, view_ids, self._loader.shape[:2]) if self._spec.has_boxes else None
        mixing = self._draw_mixing(epoch, first)
        return _Epoch(ids, view_indices, torch.from_numpy(np.stack(rows)), sizes, mixing, boxes)

    def _draw_mixing(self, epoch: int, first: int) -> Tensor | None:
        """Return how the batches of an epoch from `first` on are mixed, the same in every process."""
        if self._mixing is None:
            return None
        return torch.from_numpy(self._mixing.draw(self._seed, epoch, np.arange(first, self.per_epoch, dtype=np.int64)))

    def _view_ids(self, ids: NDArray[np.int64], view_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._table is None:
            return view_indices
        return self._table[np.searchsorted(self._ids, ids), view_indices].astype(np.int64)


def _view_table(spec: ViewSpec, view_seed: int, ids: NDArray[np.int64], n_views: int) -> NDArray[Any]:
    """Return `view_table` in the smallest dtype: 64 MB for 50 crops of each image of ImageNet, not 512 MB."""
    table = np.empty((len(ids), n_views), np.min_scalar_type(spec.count - 1))
    for start in range(0, len(ids), _TABLE_ROWS):
        part = slice(start, start + _TABLE_ROWS)
        table[part] = view_table(spec, view_seed, ids[part], n_views)
    return table
