"""Comparing a cache with its teacher: fresh logits of a few samples, and how far the stored ones may be off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.data.counter import IntArray
from kdfast.data.split import Source
from kdfast.nets.checkpoint import Model
from kdfast.teacher.forward import Forward, Precision, default_batch

# Largest error allowed, as a share of a row's largest logit (at least 1). float32: other batches and machines sum in
# another order. float16 storage adds half a unit in the last of its 11 bits. bfloat16 has 8 bits at every layer.
_ARITHMETIC = {"float32": 1e-3, "bfloat16": 0.15}
_STORAGE = {torch.float32: 0.0, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Verification:
    """The outcome of comparing stored with fresh logits.

    Attributes:
        rows: Number of rows compared.
        largest_difference: The largest absolute difference of a logit, in the row that exceeds its allowance the most.
        allowed: What that row may differ by.
        worst_row: Its position.
        agreement: Share of rows with the same arg-max, in percent.
    """

    rows: int
    largest_difference: float
    allowed: float
    worst_row: int
    agreement: float

    @property
    def passed(self) -> bool:
        """Whether every logit is as close as rounding explains."""
        return self.largest_difference <= self.allowed

    @staticmethod
    def compare(stored: Tensor, fresh: Tensor, precision: Precision) -> Verification:
        """Compare stored logits (n, C), in the stored dtype, with fresh ones (n, C) in float32."""
        difference = (stored.float() - fresh).abs().amax(1)
        allowed = (_ARITHMETIC[precision] + _STORAGE[stored.dtype]) * fresh.abs().amax(1).clamp(min=1.0)
        worst = int((difference / allowed).argmax())
        agreement = 100 * float((stored.float().argmax(1) == fresh.argmax(1)).float().mean())
        return Verification(len(fresh), float(difference[worst]), float(allowed[worst]), worst, agreement)


def recompute(source: Source, model: Model, ids: IntArray, views: IntArray, device: torch.device) -> Tensor:
    """Logits (n, C), float32 on the CPU, of one view (n,) of each training sample (n,), computed in float32."""
    forward = Forward(model, source.views, device, default_batch(device))
    images = torch.from_numpy(source.train.read(ids)).to(device)
    return forward.views(images, views[:, None], ids, "float32")[:, 0]
