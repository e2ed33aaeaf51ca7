"""Batches of an epoch: samples, order and views, independent of the number of processes and of interruptions."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.loaders import Loader
from kdfast.data.order import batch_count, epoch_order, split_batches_by_rank
from kdfast.data.views import ViewSpec, draw_view_indices, view_table
from kdfast.distill.distributed import Distributed
from kdfast.distill.targets import BatchTargets
from kdfast.teacher.row_format import TeacherLogits


@dataclass(frozen=True)
class Batch:
    """Input of one step.

    Attributes:
        ids: int64 (B,), indices into the training split.
        images: uint8 (B, H, W, 3) on the device; valid until the next batch is requested.
        view_ids: int64 (B,) on the CPU, where views are decoded.
        teacher: The teacher's logits for the B samples, on the device; None without a teacher.
    """

    ids: Tensor
    images: Tensor
    view_ids: Tensor
    teacher: TeacherLogits | None


class Batches:
    """The seeded batches of a run over a subset.

    Args:
        ids: int64 (n,), the kept samples.
        loader: Loader of the images.
        spec: The data's set of views.
        n_views: Number of views per sample.
        view_seed: Seed of the choice of views.
        targets: Source of the teacher's logits, or None.
        batch_size: Samples per batch; the last batch of an epoch may be smaller.
        seed: Seed of the order and the views.
        device: Where the images go.
        distributed: This process among those of the run; each gets its share of every batch.
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        loader: Loader,
        spec: ViewSpec,
        *,
        n_views: int,
        view_seed: int,
        targets: BatchTargets | None,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        distributed: Distributed | None = None,
    ) -> None:
        self._ids = np.sort(ids)
        self._loader, self._targets = loader, targets
        self._n_views, self._batch_size, self._seed = n_views, batch_size, seed
        self._device = torch.device(device)
        self._distributed = distributed or Distributed()
        # With all views, a view index is the view id itself.
        self._table = None if n_views == spec.count else view_table(spec, view_seed, self._ids, n_views)

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
        order = epoch_order(self._ids, self._seed, epoch)
        rank, world = self._distributed.rank, self._distributed.world_size
        shares = list(split_batches_by_rank(order, self._batch_size, start=first, rank=rank, world=world))
        ids = np.concatenate(shares)
        view_indices = draw_view_indices(self._seed, epoch, ids, self._n_views)
        view_ids = torch.from_numpy(self._view_ids(ids, view_indices))
        if self._targets is not None:
            self._targets.begin_epoch(ids, view_indices)
        start = 0
        for images in self._loader.batches(ids, len(shares[0])):
            rows = slice(start, start + len(images))
            on_device = images.to(self._device)
            teacher = None if self._targets is None else self._targets.batch(start, on_device, view_ids[rows])
            yield Batch(torch.from_numpy(ids[rows]), on_device, view_ids[rows], teacher)
            start = rows.stop

    def _view_ids(self, ids: NDArray[np.int64], view_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._table is None:
            return view_indices
        view_ids: NDArray[np.int64] = self._table[np.searchsorted(self._ids, ids), view_indices]
        return view_ids
