"""The teacher's cross-entropy, of which the published rule keeps the middle."""

from __future__ import annotations

import numpy as np

from kdfast.data.arrays import rows_of
from kdfast.data.stateless_random import IntArray
from kdfast.files.arrays import row_blocks
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import Float32Array, ScoreInputs, ScoreResult, require_logits


def medium(inputs: ScoreInputs) -> ScoreResult:
    """Cross-entropy of the teacher on the unaugmented samples; the rule `moderate` keeps the middle of the ranking.

    The published method ranks each class by itself, as every balance but `none` does. Its public code computes the
    cross-entropy on one augmented view of each sample, here it is the sample itself.

    The method also reshapes the teacher's logits during distillation, which does not change the selection: see
    `reshape_logits` in `kdfast.distillation.config.RunConfig`.

    Source:
        Chen et al., Medium-Difficulty Samples Constitute Smoothed Decision Boundary for Knowledge Distillation on
        Pruned Datasets, ICLR 2025.
    """
    return ScoreResult(cross_entropy(require_logits(inputs, "medium"), inputs.labels))


def cross_entropy(logits: Float32Array, labels: IntArray) -> FloatArray:
    """Return -ln softmax(z)_y, float64 (N,), computed in float64, a block of rows at a time.

    It is ln(1 + sum over k != y of exp(z_k - z_y)), which keeps its relative precision where p_y rounds to 1, as for
    most training samples of a trained teacher.

    Args:
        logits: float32 (N, C), raw.
        labels: int64 (N,).
    """
    losses = np.empty(len(labels))
    for part, values in row_blocks(logits, rows_of(logits)):
        block = values.astype(np.float64)
        rows = np.arange(len(block)), labels[part]
        own = block[rows]
        largest = block.max(axis=1, keepdims=True)
        block[rows] = -np.inf
        others = np.exp(block - largest).sum(axis=1)
        with np.errstate(divide="ignore"):  # no other class, or all of them beyond the range: a loss of 0
            losses[part] = np.logaddexp(0, np.log(others) + largest[:, 0] - own)
    return losses
