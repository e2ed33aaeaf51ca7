"""Correctness of samples in the training batches that they are part of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError


class BatchCorrectness:
    """Whether the network was right about each sample in the last training batch that held it.

    Batches are added on the device and nothing waits for it, so that `add` may be part of a CUDA graph.

    Args:
        labels: int64 (N,).
        device: Device of the training.

    Attributes:
        device: Device of the training.
    """

    def __init__(self, labels: IntArray, device: torch.device) -> None:
        self.device = device
        self._labels = torch.from_numpy(labels).to(device)
        self._correct = torch.zeros(len(labels), dtype=torch.bool, device=device)
        self._seen = torch.zeros_like(self._correct)
        self._faults = torch.zeros(2, dtype=torch.bool, device=device)

    @torch.no_grad()
    def add(self, ids: Tensor, logits: Tensor) -> None:
        """Add a batch; of a sample that is in it twice, the last row counts.

        Args:
            ids: int64 (B,), on the device.
            logits: (B, C), on the device.
        """
        n = len(self._labels)
        faults = torch.stack([~torch.isfinite(logits).all(), ((ids < 0) | (ids >= n)).any()])
        ids, order = ids.clamp(0, n - 1).sort(stable=True)
        correct = logits.argmax(1)[order] == self._labels[ids]
        # Equal ids are written in no certain order, so all of them get the value of the last.
        last = torch.searchsorted(ids, ids, right=True) - 1
        self._correct.index_copy_(0, ids, correct[last])
        self._seen.index_fill_(0, ids, True)
        self._faults |= faults

    def read(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Wait for the device and return which samples were correct and which were seen, bool (N,) each.

        Raises:
            DataError: Logits were not finite, or sample ids out of range.
        """
        not_finite, outside = self._faults.tolist()
        if not_finite:
            raise DataError("logits of a training batch are not finite: training diverged; lower its learning rate")
        if outside:
            raise DataError(f"sample ids of a training batch are out of range: pass 0 to {len(self._labels) - 1}")
        return self._correct.cpu().numpy().copy(), self._seen.cpu().numpy().copy()

    def reset(self) -> None:
        """Begin the next epoch, with no sample seen. Values are replaced in place: a CUDA graph remembers addresses."""
        for values in (self._correct, self._seen, self._faults):
            values.zero_()

    def merge(self, correct: Tensor, seen: Tensor) -> None:
        """Add what others have added after this, bool (N,) each; samples that they have not seen are not correct."""
        self._correct.copy_(torch.where(seen, correct, self._correct))
        self._seen |= seen

    def state(self) -> dict[str, Tensor]:
        """Return what was added since the last reset, for a checkpoint."""
        return {"correct": self._correct, "seen": self._seen}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a state."""
        self._correct.copy_(state["correct"])
        self._seen.copy_(state["seen"])
