"""Compare a cache with its teacher: recompute the logits of a few samples and bound the error of the stored ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdfast.data.source import Source
from kdfast.data.views import view_table
from kdfast.errors import CacheMismatch
from kdfast.nets.checkpoint import Model
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.checks import check_match
from kdfast.teacher.predictor import Predictor, default_batch_size
from kdfast.teacher.row_format import TeacherLogits

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


def verify_cache(
    cache: TeacherCache,
    source: Source,
    model: Model,
    samples: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Verification:
    """Recompute the teacher's logits on random views of random samples and compare them with the cache.

    Args:
        cache: The cache.
        source: The data.
        model: The teacher.
        samples: Number of samples to draw, without repetition.
        seed: Seed of the draw.
        device: Where to compute.

    Raises:
        CacheMismatch: The cache was made by another teacher or from other data, or logits differ by more than rounding
            explains.
    """
    check_match(cache.path, cache.manifest, source, model, views=False)
    draw = np.random.default_rng(seed)
    ids = np.sort(draw.choice(cache.coverage, size=min(samples, len(cache.coverage)), replace=False))
    view_indices = draw.integers(0, cache.n_views, size=len(ids))
    stored = cache.lookup(ids, view_indices) if cache.top_k is None else cache.lookup_top_k(ids, view_indices)
    views = view_table(cache.spec, cache.view_seed, ids, cache.n_views)[np.arange(len(ids)), view_indices]
    place = torch.device(device)
    images = torch.from_numpy(source.train.read(ids)).to(place)
    predictor = Predictor(model, cache.spec, place, default_batch_size(place))
    fresh = predictor.predict_views(images, views[:, None], ids, "float32")[:, 0]
    report = _compare(cache, stored, fresh)
    if not report.passed:
        worst = int(ids[report.worst_row])
        raise CacheMismatch(
            f"{cache.path}: logits of {len(ids)} samples were recomputed and differ by up to "
            f"{report.largest_difference:.4g} (sample {worst}), allowed {report.allowed:.4g}: build the cache again"
        )
    return report


def _compare(cache: TeacherCache, stored: TeacherLogits, fresh: Tensor) -> Verification:
    """Compare stored rows (n,) of a cache with recomputed float32 logits (n, C)."""
    if isinstance(stored, TopKTeacher):
        assert cache.top_k is not None
        difference, predicted = _top_k_difference(stored, fresh, cache.top_k.temperature)
    else:
        difference, predicted = (stored.float() - fresh).abs().amax(1), stored.float().argmax(1)
    tolerance = _ARITHMETIC[cache.manifest["precision"]] + _STORAGE[cache.dtype]
    allowed = tolerance * fresh.abs().amax(1).clamp(min=1.0)
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
