"""Sample scores that the policy ranks: influence functions on the teacher's last layer (a softmax head), and EL2N.

They require only the teacher's cached logits and features; higher = harder. The teacher fits its own training set
almost perfectly, so a single residual is mostly rounding and chance. A student trains on a sample's views, so the
relevant gradient is the mean over views: `mean_logits` returns the logits whose softmax is the mean probability over
the views, and the residual in every score below becomes the mean residual. Only `removal` and `absolute` fit
a head of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.dynamics.metrics import el2n_without_cancellation
from kdfast.errors import DataError
from kdfast.ops.softmax_head import head_influence, head_logits, head_newton, head_self_influence
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.influence import DEFAULT_L2
from kdfast.pruning.scores.sampled_head import self_method

# Weight of the penalty of the heads that cross-fitting trains; a fit, not an influence, so it has a value of its own.
_CROSS_FIT_L2 = 1e-3
_FOLDS = 5


@dataclass(frozen=True)
class HeadInputs:
    """Inputs of a score: the teacher's head and the data. The tensors are on the device of the search.

    Attributes:
        logits: float32 (N, C), the teacher's logits; `mean_logits` where several views are known.
        features: float32 (N, D), inputs of the teacher's last layer.
        labels: int64 (N,).
        held_out: int64 (n,), positions of the held-out set.
        seed: Seed of any randomness in the score.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor
    held_out: IntArray
    seed: int = 0


SampleScore = Callable[[HeadInputs], FloatArray]

# Names of the scores that depend on `DEFAULT_L2`, and of those that fit a head to its optimum.
INFLUENCES = ("self", "removal", "absolute")
AT_OPTIMUM = ("removal", "absolute")


def mean_logits(views: Iterable[Tensor]) -> Tensor:
    """Return logits whose softmax is the mean of the views' probabilities.

    Args:
        views: Logits (N, C) of each view, any floating dtype.

    Returns:
        float32 (N, C), normalized log-probabilities.

    Raises:
        DataError: `views` is empty.
    """
    total: Tensor | None = None
    count = 0
    for logits in views:
        log_p = logits.double().log_softmax(1)
        total = log_p if total is None else torch.logaddexp(total, log_p)
        count += 1
    if total is None:
        raise DataError("`views` is empty: pass the logits of at least one view")
    mean: Tensor = total - math.log(count)
    return mean.float()


def self_influence(inputs: HeadInputs) -> FloatArray:
    """Return `g_i^T H^-1 g_i / N`: the increase of a sample's own loss when it is removed.

    For a head of more than 10,000 weights, H is the Kronecker approximation of the Hessian; the score `influence` with
    `kind=self` has an option for the exact one.

    Source: Koh and Liang 2017, https://arxiv.org/abs/1703.04730, section 5.4.
    """
    method = self_method(inputs.logits.shape[1], inputs.features.shape[1])
    values = head_self_influence(inputs.features, inputs.logits, inputs.labels, l2=DEFAULT_L2, method=method)
    return values.double().cpu().numpy()


def removal(inputs: HeadInputs) -> FloatArray:
    """Return `g_val^T H^-1 g_i / N`: the increase of the held-out loss when a sample is removed; > 0: it helps.

    The teacher's head is not at the optimum of its cached features, where alone the prediction holds, so a head is
    first fitted to all samples: the logits of the teacher are not used.

    Source: Koh and Liang 2017, https://arxiv.org/abs/1703.04730, equation 2.
    """
    rows = torch.from_numpy(inputs.held_out).to(inputs.features.device)
    h, y = inputs.features, inputs.labels
    z = head_logits(h, head_newton(h, y, l2=DEFAULT_L2, classes=inputs.logits.shape[1], method="cg"))
    return head_influence(h, z, y, h[rows], z[rows], y[rows], l2=DEFAULT_L2).double().cpu().numpy()


def absolute(inputs: HeadInputs) -> FloatArray:
    """Return the absolute value of `removal`: the size of a sample's effect on the held-out loss."""
    return np.abs(removal(inputs))


def residual(inputs: HeadInputs) -> FloatArray:
    """Return EL2N, the norm of softmax(logits) - onehot(label): influence without features and curvature.

    Source: Paul, Ganguli, Dziugaite 2021, https://arxiv.org/abs/2107.07075.
    """
    return el2n_without_cancellation(inputs.logits.double(), inputs.labels).cpu().numpy()


def crossfit(inputs: HeadInputs) -> FloatArray:
    """Return the residual norm under a head fitted without the sample (five heads, each on four fifths of the data).

    The features are still those of a teacher trained on all samples, so this removes the overfit of the head alone.
    """
    labels, device = inputs.labels, inputs.features.device
    fold = hash64(Purpose.HOLDOUT, inputs.seed, _FOLDS, np.arange(len(labels), dtype=np.int64)) % np.uint64(_FOLDS)
    norms = torch.empty(len(labels), dtype=torch.float64, device=device)
    for k in range(_FOLDS):
        train, test = (torch.from_numpy(np.flatnonzero(part)).to(device) for part in (fold != k, fold == k))
        classes = inputs.logits.shape[1]
        weights = head_newton(inputs.features[train], labels[train], l2=_CROSS_FIT_L2, tol=1e-6, classes=classes)
        norms[test] = el2n_without_cancellation(head_logits(inputs.features[test], weights), labels[test])
    return norms.cpu().numpy()


SAMPLE_SCORES: dict[str, SampleScore] = {
    "self": self_influence,
    "removal": removal,
    "absolute": absolute,
    "residual": residual,
    "crossfit": crossfit,
}
