"""Teacher's logits reshaped to the spread of their class."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.errors import CacheMismatch
from kdfast.teacher.cache import TeacherCache


class Reshaping:
    """Divides a sample's logits by their standard deviation over the classes, and multiplies them by its class's mean.

    The mean is over all training samples of the sample's label, so a student that sees few of them still learns how
    certain the teacher is of the class. The public code takes it over one augmented view of each sample; here it is the
    unaugmented sample.

    Args:
        spread: float64 (C,), mean standard deviation of the logits of each class.
        labels: int64 (N,), classes of the training split.

    Source:
        Chen et al., Medium-Difficulty Samples Constitute Smoothed Decision Boundary for Knowledge Distillation on
        Pruned Datasets, ICLR 2025; the standard deviation is the unbiased one, as in its public code.
    """

    def __init__(self, spread: NDArray[np.float64], labels: NDArray[np.int64]) -> None:
        self._spread = torch.from_numpy(spread[labels])

    @classmethod
    def of_cache(cls, cache: TeacherCache, labels: NDArray[np.int64]) -> Reshaping:
        """Return the reshaping for a cache of the whole training split.

        Raises:
            CacheMismatch: The cache lacks samples, or classes of them.
        """
        cache.check_covers(np.arange(len(labels), dtype=np.int64))
        if cache.top_k is not None:
            raise CacheMismatch(
                f"{cache.path} holds the {cache.top_k.k} most probable classes, and `reshape_logits` needs all: build "
                "a cache of features (`kind`) or of all classes, or omit it"
            )
        deviations = cache.identity_logits().std(axis=1, ddof=1, dtype=np.float64)
        count = np.bincount(labels, minlength=cache.classes)
        total = np.bincount(labels, weights=deviations, minlength=cache.classes)
        return cls(total / np.maximum(count, 1), labels)

    def __call__(self, logits: Tensor, ids: NDArray[np.int64]) -> Tensor:
        """Return the logits (n, C) of samples (n,) reshaped, in their dtype; a row of equal logits stays as it is."""
        wide = logits.double()
        deviations = wide.std(dim=1, keepdim=True)
        factors = self._spread[torch.from_numpy(ids)][:, None] / deviations
        return torch.where(deviations > 0, wide * factors, wide).to(logits.dtype)
