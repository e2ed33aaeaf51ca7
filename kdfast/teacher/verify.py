"""Compare a cache with its teacher: recompute the logits of a few samples and bound the error of the stored ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import view_table
from kdfast.errors import CacheMismatch
from kdfast.nets.checkpoint import Model
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.checks import check_match
from kdfast.teacher.predictor import Predictor, default_batch_size

# Largest allowed error, relative to a row's largest logit (at least 1). float32: other batch sizes and machines sum in
# another order. float16 storage adds half a unit in the last of its 11 bits. bfloat16 has 8 bits at every layer.
_ARITHMETIC = {"float32": 1e-3, "bfloat16": 0.15}
_STORAGE = {torch.float32: 0.0, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Verification:
    """Comparison of stored with recomputed logits.

    Attributes:
        rows: Number of rows compared.
        largest_difference: Largest absolute difference of a logit, or of a feature, in the worst row, the one with the
            highest ratio of difference to allowed difference.
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
    views = view_table(cache.spec, cache.view_seed, ids, cache.n_views)[np.arange(len(ids)), view_indices]
    place = torch.device(device)
    images = torch.from_numpy(source.train.read(ids)).to(place)
    predictor = Predictor(model, cache.spec, place, default_batch_size(place))
    keep = {"features": True} if cache.head is not None else {}
    fresh = predictor.predict_views(images, views[:, None], ids, "float32", **keep)[:, 0]
    report = _compare(cache, *_differences(cache, ids, view_indices, fresh), fresh)
    if not report.passed:
        worst = int(ids[report.worst_row])
        raise CacheMismatch(
            f"{cache.path}: entries of {len(ids)} samples were recomputed and differ by up to "
            f"{report.largest_difference:.4g} (sample {worst}), allowed {report.allowed:.4g}: build the cache again"
        )
    return report


def _differences(cache: TeacherCache, ids: IntArray, view_indices: IntArray, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest difference of each stored row from logits (n, C), and whether it has their arg-max.

    Of a cache of features, these are compared, (n, D).
    """
    if cache.top_k is None:
        stored = cache.lookup_rows(ids, view_indices).float()
        head = cache.head
        a, b = (stored, fresh) if head is None else (head.logits(stored), head.logits(fresh))
        return (stored - fresh).abs().amax(1), a.argmax(1) == b.argmax(1)
    found = [
        _top_k_difference(cache.lookup_top_k(ids, view_indices, temperature), fresh, temperature, _STORAGE[cache.dtype])
        for temperature in cache.top_k.temperatures
    ]
    return torch.stack([difference for difference, _ in found]).amax(0), found[0][1] == fresh.argmax(1)


def _compare(cache: TeacherCache, difference: Tensor, agrees: Tensor, fresh: Tensor) -> Verification:
    """Compare the differences of stored rows (n,) from recomputed ones (n, width) with what rounding explains."""
    tolerance = _ARITHMETIC[cache.manifest["precision"]] + _STORAGE[cache.dtype]
    allowed = tolerance * fresh.abs().amax(1).clamp(min=1.0)
    worst = int((difference / allowed).argmax())
    agreement = 100 * float(agrees.float().mean())
    return Verification(len(fresh), float(difference[worst]), float(allowed[worst]), worst, agreement)


def _top_k_difference(stored: TopKTeacher, fresh: Tensor, temperature: float, rounding: float) -> tuple[Tensor, Tensor]:
    """Return a lower bound on each row's largest logit difference, and its most probable class."""
    values, classes = stored.values.float(), stored.classes.long()
    others = fresh.scatter(1, classes, -torch.inf)
    kept = (values - fresh.gather(1, classes)).abs().amax(1)
    # An omitted class should not be more probable than a kept one.
    missed = (others.amax(1) - values.amin(1)).clamp(min=0)
    # A log-sum-exp changes by at most the largest change of its exponents.
    tail = (others / temperature).logsumexp(1)
    rest = temperature * ((stored.tail - tail).abs() - rounding * tail.abs()).clamp(min=0)
    return torch.stack([kept, missed, rest]).amax(0), classes.gather(1, values.argmax(1, keepdim=True))[:, 0]
