"""The batches of an epoch: which samples, in which order, in which view; the same however the run is cut or resumed."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.loaders import Loader
from kdfast.data.order import batch_count, epoch_order, rank_batches
from kdfast.data.views import ViewSpec, draw_slots, view_table
from kdfast.distill.distributed import Ranks
from kdfast.distill.targets import Targets
from kdfast.teacher.rows import TeacherRows


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Attributes:
        ids: int64 (B,), indices into the training split.
        images: uint8 (B, H, W, 3) on the device; valid until the next batch is asked for.
        view_ids: int64 (B,) on the CPU, where views are decoded.
        teacher: The teacher's B rows on the device, or None.
    """

    ids: Tensor
    images: Tensor
    view_ids: Tensor
    teacher: TeacherRows | None


class Batches:
    """The seeded batches of a run over a subset.

    Args:
        ids: int64 (n,), the kept samples.
        loader: Yields their images.
        spec: The data's views.
        n_views: How many of them each sample may be seen in.
        view_seed: Seed of that choice.
        targets: The teacher's side, or None.
        batch_size: Samples a batch; the last of an epoch may be smaller.
        seed: Seed of order and views.
        device: Where the images go.
        ranks: This process among those of the run; each has its share of every batch.
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        loader: Loader,
        spec: ViewSpec,
        *,
        n_views: int,
        view_seed: int,
        targets: Targets | None,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self._ids = np.sort(ids)
        self._loader, self._targets = loader, targets
        self._n_views, self._batch_size, self._seed = n_views, batch_size, seed
        self._device = torch.device(device)
        self._ranks = ranks or Ranks()
        whole = n_views == spec.count
        self._table = None if whole else view_table(spec, view_seed, self._ids, n_views)

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return batch_count(len(self._ids), self._batch_size)

    def size_of(self, step: int) -> int:
        """Samples in the batch of a step, over all processes."""
        last = (step + 1) % self.per_epoch == 0
        return len(self._ids) - (self.per_epoch - 1) * self._batch_size if last else self._batch_size

    def epoch(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        """Yield this process's share of the batches of one epoch, from batch `first` on."""
        order = epoch_order(self._ids, self._seed, epoch)
        shares = list(
            rank_batches(order, self._batch_size, start=first, rank=self._ranks.rank, world=self._ranks.world)
        )
        ids = np.concatenate(shares)
        slots = draw_slots(self._seed, epoch, ids, self._n_views)
        views = self._view_ids(ids, slots)
        if self._targets is not None:
            self._targets.begin_epoch(ids, slots)
        start = 0
        for images in self._loader.batches(ids, len(shares[0])):
            stop = start + len(images)
            view_ids = torch.from_numpy(views[start:stop])
            placed = images.to(self._device)
            teacher = None if self._targets is None else self._targets.batch(start, placed, view_ids)
            yield Batch(torch.from_numpy(ids[start:stop]), placed, view_ids, teacher)
            start = stop

    def _view_ids(self, ids: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._table is None:
            return slots
        rows: NDArray[np.int64] = self._table[np.searchsorted(self._ids, ids), slots]
        return rows
