"""The scores whose ranks the policy works on: influence functions on the teacher's last layer, a softmax head.

They need the teacher's cached logits and features alone; higher = harder. The teacher has fitted its own training set,
often almost perfectly, and a single residual there is mostly rounding and chance. What a student trains on is a
sample's views, so its gradient is the mean over views: `mean_logits` gives the logits whose softmax is the mean
probability over the views, and with it the residual of every score below is the mean residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import DataError
from kdfast.prune.if_beta.policy import FloatArray

_L2 = 1e-3
_FOLDS = 5


@dataclass(frozen=True)
class Signals:
    """What a score may be computed from.

    Attributes:
        logits: float32 (N, C), the teacher's logits; where views are known, their `mean_logits`.
        features: float32 (N, D), the inputs of its last layer.
        labels: int64 (N,).
        held: int64 (n,), positions of the held-out part.
        seed: Seed of whatever the score draws.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor
    held: IntArray
    seed: int = 0


SampleScore = Callable[[Signals], FloatArray]


def mean_logits(views: Iterable[Tensor]) -> Tensor:
    """Logits whose softmax is the mean of the views' probabilities.

    Args:
        views: Logits (N, C) of each view, any floating dtype.

    Returns:
        float32 (N, C), normalised log-probabilities.

    Raises:
        DataError: There is no view.
    """
    total: Tensor | None = None
    count = 0
    for logits in views:
        log_p = logits.double().log_softmax(1)
        total = log_p if total is None else torch.logaddexp(total, log_p)
        count += 1
    if total is None:
        raise DataError("no view's logits were given: give those of one view at least")
    mean: Tensor = total - math.log(count)
    return mean.float()


def self_influence(signals: Signals) -> FloatArray:
    """`g_i^T H^-1 g_i / N`: how much a sample's own loss rises when it is left out.

    Source: Koh and Liang 2017, https://arxiv.org/abs/1703.04730, section 5.4.
    """
    from kdfast.ops.softmax_head import head_self_influence

    values = head_self_influence(signals.features, signals.logits, signals.labels, l2=_L2)
    return values.double().cpu().numpy()


def removal(signals: Signals) -> FloatArray:
    """`+g_val^T H^-1 g_i / N`: how much the held-out loss rises when the sample is left out; > 0: it helps.

    Source: Koh and Liang 2017, https://arxiv.org/abs/1703.04730, equation 2.
    """
    from kdfast.ops.softmax_head import head_influence

    held = torch.from_numpy(signals.held)
    z, h, y = signals.logits, signals.features, signals.labels
    return head_influence(h, z, y, h[held], z[held], y[held], l2=_L2).double().cpu().numpy()


def absolute(signals: Signals) -> FloatArray:
    """The absolute value of `removal`: how much a sample moves the held-out loss, either way."""
    return np.abs(removal(signals))


def residual(signals: Signals) -> FloatArray:
    """EL2N: the length of softmax(logits) - onehot(label), the influence with features and curvature left out.

    Source: Paul, Ganguli, Dziugaite 2021, https://arxiv.org/abs/2107.07075.
    """
    return _residual(signals.logits.double(), signals.labels).numpy()


def crossfit(signals: Signals) -> FloatArray:
    """The residual's length under a head that has not seen the sample: five heads, each fitted on four fifths.

    The features are the teacher's own, which has seen all samples, so this mends the fit of the head alone.
    """
    from kdfast.ops.softmax_head import head_logits, head_newton

    labels = signals.labels
    fold = hash64(Purpose.HOLDOUT, signals.seed, _FOLDS, np.arange(len(labels), dtype=np.int64)) % np.uint64(_FOLDS)
    lengths = torch.empty(len(labels), dtype=torch.float64)
    for k in range(_FOLDS):
        outside, inside = torch.from_numpy(fold != k), torch.from_numpy(fold == k)
        classes = signals.logits.shape[1]
        weights = head_newton(signals.features[outside], labels[outside], l2=_L2, tol=1e-6, classes=classes)
        lengths[inside] = _residual(head_logits(signals.features[inside], weights), labels[inside])
    return lengths.numpy()


SAMPLE_SCORES: dict[str, SampleScore] = {
    "self": self_influence,
    "removal": removal,
    "absolute": absolute,
    "residual": residual,
    "crossfit": crossfit,
}


def _residual(logits: Tensor, labels: Tensor) -> Tensor:
    p = logits.softmax(1)
    # p_y - 1 as minus the sum of the others, which does not round to zero where the teacher is sure.
    others = p.scatter(1, labels[:, None], 0)
    errors = others.scatter(1, labels[:, None], -others.sum(1, keepdim=True))
    length: Tensor = torch.linalg.vector_norm(errors, dim=1)
    return length
