"""IF-Beta on splits of more than `LARGE` samples: scores from a stream over the cache, the search on a sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kdfast.data.arrays import gather_rows
from kdfast.data.holdout import stratified_sample
from kdfast.data.stateless_random import IntArray
from kdfast.dynamics.metrics import el2n_without_cancellation
from kdfast.errors import UsageError
from kdfast.files.arrays import map_read_only
from kdfast.ops.softmax_head.residuals import LossConfig
from kdfast.pruning.if_beta.scores import AT_OPTIMUM, mean_logits
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.influence import DEFAULT_L2
from kdfast.pruning.scores.registry import compute_score
from kdfast.pruning.scores.sampled_head import SAMPLE, HeadBlocks, self_method, streamed_self_influence
from kdfast.pruning.selector import SelectorInputs
from kdfast.teacher.cache import TeacherCache


class MeanLogits:
    """The `mean_logits` of consecutive samples over the first views of a cache, computed on access.

    Args:
        cache: A cache of all samples and all classes.
        views: Number of views.
    """

    def __init__(self, cache: TeacherCache, views: int) -> None:
        self._cache, self._views = cache, views

    def __getitem__(self, part: slice) -> npt.NDArray[np.float32]:
        return self.of(np.arange(*part.indices(len(self._cache)), dtype=np.int64)).numpy()

    def of(self, ids: IntArray) -> torch.Tensor:
        """Return those of some samples, float32 (n, C)."""
        views = (self._cache.lookup(ids, np.full_like(ids, view)) for view in range(self._views))
        return mean_logits(views)


def streamed_scores(inputs: SelectorInputs, views: int) -> FloatArray:
    """Return IF-Beta's own score, the option `score`, of all training samples, float64 (N,).

    Args:
        inputs: Inputs of the selection.
        views: Views whose mean the scores are computed from; those of `removal` and `absolute` are of the unaugmented
            sample, as are all of a cache of the most probable classes.

    Raises:
        UsageError: The score needs all samples in memory.
    """
    name, cache, labels = str(inputs.options["score"]), inputs.cache, inputs.source.train.labels
    features, logits = map_read_only(cache.features()), map_read_only(cache.identity_logits())
    if name in AT_OPTIMUM:
        asked = ScoreInputs(labels, inputs.seed, logits, features, device=inputs.device, options={"kind": name})
        return compute_score("influence", asked).values
    mean = MeanLogits(cache, views) if views > 1 and cache.top_k is None else None
    blocks = HeadBlocks(features, logits if mean is None else mean, labels, None, teacher=False, device=inputs.device)
    if name == "self":
        rows = stratified_sample(labels, SAMPLE, seed=inputs.seed)
        z, h = rows_of_cache(cache, rows)
        some = h, z if mean is None else mean.of(rows), torch.from_numpy(labels[rows])
        method = self_method(logits.shape[1], features.shape[1])
        h, z, y = (tensor.to(inputs.device) for tensor in some)
        return streamed_self_influence(blocks, (h.double(), z.double(), y), DEFAULT_L2, LossConfig(), method)
    if name == "residual":
        found = [el2n_without_cancellation(z.double(), y).cpu() for _, z, y, _ in blocks]
        return np.asarray(torch.cat(found).numpy(), dtype=np.float64)
    raise UsageError(
        f"the score {name} fits heads to all of {len(labels)} samples in memory: pass another score of if-beta, or "
        "finished scores as `scores`"
    )


def rows_of_cache(cache: TeacherCache, samples: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and the features of some samples, float32 in memory."""
    logits, features = (
        torch.from_numpy(gather_rows(map_read_only(array), samples))
        for array in (cache.identity_logits(), cache.features())
    )
    return logits, features
