"""Influence of a training sample on a softmax head over the teacher's features."""

from __future__ import annotations

import numpy as np
import torch

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import UsageError
from kdfast.prune.rules.base import FloatArray, Option
from kdfast.prune.scores.base import Floats32, Scored, ScoreInputs, need_features, need_logits

OPTIONS = {
    "kind": Option(
        "removal",
        "removal: rise of the validation loss when the sample is removed, positive for helpful ones; absolute: its "
        "size; self: rise of the sample's own loss, largest for memorised and mislabelled ones",
        choices=("removal", "absolute", "self"),
    ),
    "l2": Option(0.1, "weight of the head's penalty (l2 / 2) ||W||^2", low=1e-12, high=1e6),
    "holdout": Option(0.1, "share of the training split that the head does not see", low=1e-6, high=0.5),
    "polish": Option(
        "yes", "train the head to its optimum first (yes), or take the teacher's as it is (no)", choices=("yes", "no")
    ),
}


def influence(inputs: ScoreInputs) -> Scored:
    """Change of a loss when a training sample is removed, to first order, from the inverse Hessian of the head.

    `removal` is + g_val^T H^-1 g_i / N: above zero for samples whose removal raises the validation loss, the helpful
    ones, which the rule `hard` keeps. `absolute` is its size; `self` is g_i^T H^-1 g_i / N.

    The validation loss is taken on a held-out part of the training split, never on the test split: `holdout` of it,
    the same number of samples of every class, in two halves. The head is trained and differentiated twice, each time on
    everything but one half, and that half validates. So a sample outside both halves has two effects, and its score is
    their mean; a sample in one half was trained on once, when the other half validated, and has that effect.
    `self` needs no validation: the head sees all samples. It takes one solve a sample, hence the Hessian as a matrix.

    A head that was trained by SGD is not at its optimum, so by default it is first brought there on the cached
    features, with the labels at hand. At an optimum the gradients of the training samples cancel but for the penalty,
    and so do those of held-out samples but for chance: with a small `l2` the effect of removal is mostly the chance of
    which samples validate. Hence the large default.

    Source:
        Koh and Liang, Understanding Black-box Predictions via Influence Functions, ICML 2017, equation 2, whose sign
        is that of up-weighting; this is the sign of removal.
    """
    features, logits = need_features(inputs, "influence"), need_logits(inputs, "influence")
    if inputs.options["kind"] == "self":
        return Scored(_self_influence(inputs, features, logits))
    halves = held_out(inputs.labels, inputs.number("holdout"), inputs.seed)
    total, count = np.zeros(len(inputs.labels)), np.zeros(len(inputs.labels))
    weights = None
    for half in halves:
        trained = np.setdiff1d(np.arange(len(inputs.labels)), half)
        # The second head differs little from the first, and both optima are unique: start there.
        weights = _head(inputs, features[trained], inputs.labels[trained], weights)
        total[trained] += _removal(inputs, features, logits, weights, trained, half)
        count[trained] += 1
    effect = total / count
    return Scored(np.abs(effect) if inputs.options["kind"] == "absolute" else effect)


def held_out(labels: IntArray, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Two disjoint validation sets, each with the same number of samples of every class.

    Args:
        labels: int64 (N,).
        share: Size of both together, as a share of N.
        seed: Seed of the choice.

    Returns:
        Two int64 arrays of ascending indices.

    Raises:
        UsageError: If that would leave nothing of some class.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    each = max(1, round(share * len(labels) / len(classes) / 2))
    if 2 * each >= sizes.min():
        raise UsageError(
            f"holding out {2 * each} samples of each class leaves none of class {classes[sizes.argmin()]}, which has "
            f"{sizes.min()}; lower --option holdout={share:g}"
        )
    order = np.argsort(hash64(Purpose.HOLDOUT, seed, np.arange(len(labels), dtype=np.int64)), kind="stable")
    drawn = [order[labels[order] == label][: 2 * each] for label in classes]
    first, second = (np.sort(np.concatenate([ids[part] for ids in drawn])) for part in (slice(each), slice(each, None)))
    return first, second


def _removal(
    inputs: ScoreInputs,
    features: Floats32,
    logits: Floats32,
    weights: torch.Tensor | None,
    trained: IntArray,
    held: IntArray,
) -> FloatArray:
    """Effect of removing each of the samples `trained` on the mean loss of the samples `held`."""
    from kdfast.ops.softmax_head import head_influence

    labels = inputs.labels
    effect = head_influence(
        _rows(features[trained], inputs),
        _logits(inputs, features[trained], logits[trained], weights),
        _tensor(labels[trained], inputs),
        _rows(features[held], inputs),
        _logits(inputs, features[held], logits[held], weights),
        _tensor(labels[held], inputs),
        l2=inputs.number("l2"),
        method="cg",
    )
    return _array(effect)


def _self_influence(inputs: ScoreInputs, features: Floats32, logits: Floats32) -> FloatArray:
    from kdfast.ops.softmax_head import head_self_influence

    weights = _head(inputs, features, inputs.labels)
    effect = head_self_influence(
        _rows(features, inputs),
        _logits(inputs, features, logits, weights),
        _tensor(inputs.labels, inputs),
        l2=inputs.number("l2"),
    )
    return _array(effect)


def _head(
    inputs: ScoreInputs, features: Floats32, labels: IntArray, start: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The head's weights (C, D + 1) at their optimum, or None for the teacher's own."""
    from kdfast.ops.softmax_head import head_newton

    if inputs.options["polish"] == "no":
        return None
    # A few solves: conjugate gradients never hold the Hessian, which at 100 classes takes minutes to build.
    return head_newton(
        _rows(features, inputs), _tensor(labels, inputs), l2=inputs.number("l2"), init=start, method="cg"
    )


def _logits(inputs: ScoreInputs, features: Floats32, logits: Floats32, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return _tensor(logits, inputs)
    rows = _rows(features, inputs)
    return rows @ weights[:, :-1].T + weights[:, -1]


def _rows(features: Floats32, inputs: ScoreInputs) -> torch.Tensor:
    """Features in float64, which the solves compute in: converted once, not once a product."""
    return _tensor(features, inputs).double()


def _tensor(array: Floats32 | IntArray, inputs: ScoreInputs) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(inputs.device)


def _array(values: torch.Tensor) -> FloatArray:
    return np.asarray(values.double().cpu().numpy(), dtype=np.float64)
