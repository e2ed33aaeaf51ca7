"""Comparing a cache with its teacher: fresh logits of a few samples, and how far the stored ones may be off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.nets.checkpoint import Model
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.teacher.forward import Forward, Precision, default_batch
from kdfast.teacher.rows import TeacherRows, TopK

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
    def compare(stored: TeacherRows, fresh: Tensor, precision: Precision, top_k: TopK | None = None) -> Verification:
        """Compare stored logits (n, C), or the `top_k` most probable of them, with fresh ones (n, C) in float32."""
        if isinstance(stored, TopKTeacher):
            assert top_k is not None
            difference, likeliest = _top_k_difference(stored, fresh, top_k.temperature)
            dtype = stored.values.dtype
        else:
            difference, likeliest, dtype = (
                (stored.float() - fresh).abs().amax(1),
                stored.float().argmax(1),
                stored.dtype,
            )
        allowed = (_ARITHMETIC[precision] + _STORAGE[dtype]) * fresh.abs().amax(1).clamp(min=1.0)
        worst = int((difference / allowed).argmax())
        agreement = 100 * float((likeliest == fresh.argmax(1)).float().mean())
        return Verification(len(fresh), float(difference[worst]), float(allowed[worst]), worst, agreement)


def _top_k_difference(stored: TopKTeacher, fresh: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """By how much a logit must differ at least for each row to be what it is, and the row's most probable class."""
    values, classes = stored.values.float(), stored.classes.long()
    others = fresh.scatter(1, classes, -torch.inf)
    kept = (values - fresh.gather(1, classes)).abs().amax(1)
    # A class that was left out should be no more probable than one that was kept.
    missed = (others.amax(1) - values.amin(1)).clamp(min=0)
    # No logarithm of a sum of exponentials moves by more than its terms' exponents.
    rest = temperature * (stored.tail - (others / temperature).logsumexp(1)).abs()
    return torch.stack([kept, missed, rest]).amax(0), classes.gather(1, values.argmax(1, keepdim=True))[:, 0]


def recompute(source: Source, model: Model, ids: IntArray, views: IntArray, device: torch.device) -> Tensor:
    """Logits (n, C), float32 on the CPU, of one view (n,) of each training sample (n,), computed in float32."""
    forward = Forward(model, source.views, device, default_batch(device))
    images = torch.from_numpy(source.train.read(ids)).to(device)
    return forward.views(images, views[:, None], ids, "float32")[:, 0]
