"""Influence of a training sample on a softmax head trained on the teacher's features."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import DataError
from kdfast.ops.softmax_head import head_influence, head_newton, head_self_influence
from kdfast.pruning.options import Only, Option
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import Float32Array, ScoreInputs, ScoreResult, require_features, require_logits

# Default weight of the head's penalty in every influence score, IF-Beta's included. At 1e-3, removal effects mostly
# reflect which samples validate: they find wrong labels with AUC 0.42, against 0.998 at 0.1 (bench/bench_planted.py).
# Self-influence hardly depends on it: its ranks at 1e-3 and 0.1 have a Spearman correlation of 0.9998 on CIFAR-10.
DEFAULT_L2 = 0.1

OPTIONS = {
    "kind": Option(
        "removal",
        "removal: rise of the validation loss without the sample, positive for helpful samples; absolute: its absolute "
        "value; self: rise of the sample's own loss, largest for memorized and mislabeled samples",
        choices=("removal", "absolute", "self"),
    ),
    "l2": Option(DEFAULT_L2, "weight of the head's penalty (l2 / 2) ||W||^2", low=1e-12, high=1e6),
    "holdout": Option(
        0.1,
        "share of the training split used for validation",
        low=1e-6,
        high=0.5,
        only=Only("with kind=removal or absolute", lambda options: options["kind"] != "self"),
    ),
    "polish": Option(
        "yes", "train the head to its optimum first, or use the teacher's head (no)", choices=("yes", "no")
    ),
    "alpha": Option(0.0, "weight of the teacher in the training loss (1 - alpha) CE + alpha T^2 KL", low=0, high=1),
    "temperature": Option(
        4.0,
        "temperature T of the teacher's term, with alpha",
        low=1e-3,
        high=1e3,
        only=Only("with alpha above 0", lambda options: options["alpha"] != 0),
    ),
}


class _Distillation(TypedDict, total=False):
    teacher: torch.Tensor
    alpha: float
    temperature: float


def influence(inputs: ScoreInputs) -> ScoreResult:
    """Predict how a loss changes when a training sample is removed, without retraining.

    The prediction is first-order and uses the inverse Hessian of the head. `removal` is + g_val^T H^-1 g_i / N:
    positive for helpful samples, whose removal raises the validation loss and which the rule `hard` keeps. `absolute`
    is its absolute value; `self` is g_i^T H^-1 g_i / N.

    The validation samples are a share `holdout` of the training split, never of the test split: the same number from
    every class, in two halves. The head is trained and differentiated twice, each time without one half, on which it is
    then validated. A sample outside both halves has two effects, and its score is their mean; a sample in one half has
    the effect found when the other half validated.
    A class of one sample is never held out, so the loss is not validated on it.
    `self` needs no validation, so the head sees all samples. It solves one system per sample, hence forms the Hessian.

    The head's training loss is the cross-entropy or, with `alpha` above 0, the distillation loss (1 - alpha) CE +
    alpha T^2 KL with the cached logits as the teacher's; `self` is then the rise of that loss. The validation loss is
    the cross-entropy always. At the teacher's own head (`polish=no`) the gradient of the teacher's term is zero.

    A head trained by SGD is not at its optimum, so by default it is first trained to its optimum on the cached features
    and the labels of the data. At the optimum the gradients of the training samples sum to zero up to the penalty, and
    those of held-out samples up to sampling noise: with a small `l2`, removal effects mostly reflect which samples
    validate. Hence the large `DEFAULT_L2`.

    Source:
        Koh and Liang, Understanding Black-box Predictions via Influence Functions, ICML 2017, equation 2, which has the
        sign of up-weighting; here it is the sign of removal.
    """
    _check_classes(inputs.labels)
    features, logits = require_features(inputs, "influence"), require_logits(inputs, "influence")
    if inputs.options["kind"] == "self":
        return ScoreResult(_self_influence(inputs, features, logits))
    halves = draw_holdout(inputs.labels, inputs.number("holdout"), inputs.seed)
    total, count = np.zeros(len(inputs.labels)), np.zeros(len(inputs.labels))
    weights = None
    for half in halves:
        trained = np.setdiff1d(np.arange(len(inputs.labels)), half)
        # The optimum is unique, and the second head is close to the first: start from the first.
        weights = _head(inputs, features[trained], logits[trained], inputs.labels[trained], weights)
        total[trained] += _removal(inputs, features, logits, weights, trained, half)
        count[trained] += 1
    effect = total / count
    return ScoreResult(np.abs(effect) if inputs.options["kind"] == "absolute" else effect)


def draw_holdout(labels: IntArray, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Draw two disjoint validation sets, each with the same number of samples from every class that has enough.

    Of a class with too few, at least one sample stays outside both sets; but a class of two samples gives one to each
    set, so that a head trained without one set has seen it. A class of one sample stays outside.

    Args:
        labels: int64 (N,).
        share: Size of both together, as a share of N.
        seed: Seed of the draw.

    Returns:
        Two int64 arrays of ascending indices.

    Raises:
        DataError: Every class has one sample.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    most = np.where(sizes == 2, 1, (sizes - 1) // 2)
    each = np.minimum(max(1, round(share * len(labels) / len(classes) / 2)), most)
    if not each.any():
        raise DataError(
            "every class has a single training sample, and influence on a validation loss holds one out of a class of "
            "two: use the score's option kind=self, which holds out none"
        )
    order = np.argsort(hash64(Purpose.HOLDOUT, seed, np.arange(len(labels), dtype=np.int64)), kind="stable")
    drawn = [order[labels[order] == label][: 2 * count] for label, count in zip(classes, each, strict=True)]
    first = np.concatenate([ids[:count] for ids, count in zip(drawn, each, strict=True)])
    second = np.concatenate([ids[count:] for ids, count in zip(drawn, each, strict=True)])
    return np.sort(first), np.sort(second)


def _check_classes(labels: IntArray) -> None:
    """Raise a DataError unless there are samples of two classes."""
    if labels.min() == labels.max():
        raise DataError(
            f"all training samples are of class {labels[0]}, and influence needs samples of two classes: use another "
            "score"
        )


def _removal(
    inputs: ScoreInputs,
    features: Float32Array,
    logits: Float32Array,
    weights: torch.Tensor | None,
    trained: IntArray,
    held: IntArray,
) -> FloatArray:
    """Return the effect of removing each of the samples `trained` on the mean loss of the samples `held`."""
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
        **_distillation(inputs, logits[trained]),
    )
    return _array(effect)


def _self_influence(inputs: ScoreInputs, features: Float32Array, logits: Float32Array) -> FloatArray:
    weights = _head(inputs, features, logits, inputs.labels)
    effect = head_self_influence(
        _rows(features, inputs),
        _logits(inputs, features, logits, weights),
        _tensor(inputs.labels, inputs),
        l2=inputs.number("l2"),
        **_distillation(inputs, logits),
    )
    return _array(effect)


def _head(
    inputs: ScoreInputs,
    features: Float32Array,
    logits: Float32Array,
    labels: IntArray,
    start: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return the head's optimal weights (C, D + 1), or None for the teacher's own head."""
    if inputs.options["polish"] == "no":
        return None
    # For a few solves use conjugate gradients: the Hessian takes minutes to build at 100 classes.
    return head_newton(
        _rows(features, inputs),
        _tensor(labels, inputs),
        l2=inputs.number("l2"),
        init=start,
        method="cg",
        **_distillation(inputs, logits),
    )


def _distillation(inputs: ScoreInputs, logits: Float32Array) -> _Distillation:
    """Return the arguments of the head's operators for the teacher's term of the training loss; none without it."""
    alpha = inputs.number("alpha")
    if alpha == 0:
        return {}
    return {"teacher": _tensor(logits, inputs), "alpha": alpha, "temperature": inputs.number("temperature")}


def _logits(
    inputs: ScoreInputs, features: Float32Array, logits: Float32Array, weights: torch.Tensor | None
) -> torch.Tensor:
    if weights is None:
        return _tensor(logits, inputs)
    rows = _rows(features, inputs)
    return rows @ weights[:, :-1].T + weights[:, -1]


def _rows(features: Float32Array, inputs: ScoreInputs) -> torch.Tensor:
    """Return features in float64, the precision of the solves, converted once rather than per product."""
    return _tensor(features, inputs).double()


def _tensor(array: Float32Array | IntArray, inputs: ScoreInputs) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(inputs.device)


def _array(values: torch.Tensor) -> FloatArray:
    return np.asarray(values.double().cpu().numpy(), dtype=np.float64)
