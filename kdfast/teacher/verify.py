"""Compare a cache with its teacher: recompute the logits of a few samples and bound the error of the stored ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.nets.checkpoint import Model
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.teacher.predictor import Precision, Predictor, default_batch_size
from kdfast.teacher.row_format import TeacherLogits, TopK

# Largest allowed error, relative to a row's largest logit (at least 1). float32: other batch sizes and machines sum in
# another order. float16 storage adds half a unit in the last of its 11 bits. bfloat16 has 8 bits at every layer.
_ARITHMETIC = {"float32": 1e-3, "bfloat16": 0.15}
_STORAGE = {torch.float32: 0.0, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Verification:
    """Comparison of stored with recomputed logits.

    Attributes:
        rows: Number of rows compared.
        largest_difference: Largest absolute difference of a logit in the worst row, the one with the highest ratio of
            difference to allowed difference.
        allowed: Largest allowed difference in that row.
        worst_row: Position of that row.
        agreement: Share of rows with the same arg-max, in percent.
    """

    rows: int
    largest_difference: float
    allowed: float
    worst_row: int
    agreement: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains every difference."""
        return self.largest_difference <= self.allowed

    @staticmethod
    def compare(stored: TeacherLogits, fresh: Tensor, precision: Precision, top_k: TopK | None = None) -> Verification:
        """Compare stored logits (n, C), or the `top_k` most probable of them, with recomputed float32 logits (n, C)."""
        if isinstance(stored, TopKTeacher):
            assert top_k is not None
            difference, predicted = _top_k_difference(stored, fresh, top_k.temperature)
            dtype = stored.values.dtype
        else:
            difference, predicted = (stored.float() - fresh).abs().amax(1), stored.float().argmax(1)
            dtype = stored.dtype
        allowed = (_ARITHMETIC[precision] + _STORAGE[dtype]) * fresh.abs().amax(1).clamp(min=1.0)
        worst = int((difference / allowed).argmax())
        agreement = 100 * float((predicted == fresh.argmax(1)).float().mean())
        return Verification(len(fresh), float(difference[worst]), float(allowed[worst]), worst, agreement)


def _top_k_difference(stored: TopKTeacher, fresh: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return a lower bound on each row's largest logit difference, and its most probable class."""
    values, classes = stored.values.float(), stored.classes.long()
    others = fresh.scatter(1, classes, -torch.inf)
    kept = (values - fresh.gather(1, classes)).abs().amax(1)
    # An omitted class should not be more probable than a kept one.
    missed = (others.amax(1) - values.amin(1)).clamp(min=0)
    # A log-sum-exp changes by at most the largest change of its exponents.
    rest = temperature * (stored.tail - (others / temperature).logsumexp(1)).abs()
    return torch.stack([kept, missed, rest]).amax(0), classes.gather(1, values.argmax(1, keepdim=True))[:, 0]


def recompute_logits(source: Source, model: Model, ids: IntArray, views: IntArray, device: torch.device) -> Tensor:
    """Compute logits (n, C), float32 on the CPU, of one view (n,) of each training sample (n,), in float32."""
    predictor = Predictor(model, source.view_spec, device, default_batch_size(device))
    images = torch.from_numpy(source.train.read(ids)).to(device)
    return predictor.predict_views(images, views[:, None], ids, "float32")[:, 0]
