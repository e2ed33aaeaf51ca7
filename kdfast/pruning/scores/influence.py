"""Influence of a training sample on a softmax head trained on the teacher's features."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch

from kdfast.data.arrays import gather_rows, group_by_class
from kdfast.data.holdout import stratified_sample
from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import DataError
from kdfast.ops.softmax_head import head_influence, head_newton, head_self_influence
from kdfast.ops.softmax_head.residuals import LossConfig
from kdfast.pruning.options import Only, Option, OptionValue
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import Float32Array, ScoreInputs, ScoreResult, require_features, require_logits
from kdfast.pruning.scores.sampled_head import (
    HEAD_TOL,
    LARGE,
    SAMPLE,
    HeadBlocks,
    exact_method,
    removal_direction,
    removal_effects,
    self_method,
    streamed_self_influence,
)

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
    "hessian": Option(
        "auto",
        "of the head: exact, which takes 16 bytes times the squared number of weights (classes times features), or a "
        "solve for every sample where these do not fit; kronecker, an approximation for heads of any size; auto: exact "
        "up to 10,000 weights",
        choices=("auto", "exact", "kronecker"),
        only=Only("with kind=self", lambda options: options["kind"] == "self"),
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
    `self` needs no validation, so the head sees all samples. It solves one system per sample, hence forms the Hessian;
    for a head of more than 10,000 weights it takes the Kronecker approximation, unless `hessian` is exact. `used` says
    which it was.

    In a split of more than 131,072 samples, the head and its Hessian come from a stratified sample of 32,768 (`sample`
    in `used`); an exact Hessian of `self` is that of all samples. Validation samples and effects are those of the whole
    split: removal effects depend on which samples validate much more than on the head.

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
    if len(inputs.labels) > LARGE:
        return _of_large_split(inputs, features, logits)
    if inputs.options["kind"] == "self":
        return _self_influence(inputs, features, logits)
    halves = draw_holdout(inputs.labels, inputs.number("holdout"), inputs.seed)
    total, count = np.zeros(len(inputs.labels)), np.zeros(len(inputs.labels))
    weights = None
    for half in halves:
        trained = np.setdiff1d(np.arange(len(inputs.labels)), half)
        # The optimum is unique, and the second head is close to the first: start from the first.
        weights = _head(inputs, features[trained], logits[trained], inputs.labels[trained], weights)
        total[trained] += _removal(inputs, features, logits, weights, trained, half)
        count[trained] += 1
    return ScoreResult(_signed(inputs, total / count))


def _of_large_split(inputs: ScoreInputs, features: Float32Array, logits: Float32Array) -> ScoreResult:
    """Return the scores with the head of a sample, as `influence` says."""
    loss = LossConfig(inputs.number("alpha"), inputs.number("temperature"))
    l2, device = inputs.number("l2"), inputs.device

    def head(samples: IntArray, start: torch.Tensor | None = None) -> torch.Tensor | None:
        x, z = gather_rows(features, samples), gather_rows(logits, samples)
        return _head(inputs, x, z, inputs.labels[samples], start, HEAD_TOL)

    def blocks(weights: torch.Tensor | None) -> HeadBlocks:
        return HeadBlocks(features, logits, inputs.labels, weights, teacher=loss.alpha > 0, device=device)

    if inputs.options["kind"] == "self":
        method = _self_method(inputs, features, logits)
        sample = stratified_sample(inputs.labels, SAMPLE, seed=inputs.seed)
        weights = head(sample)
        rows = _head_rows(inputs, features, logits, weights, sample)
        effects = streamed_self_influence(blocks(weights), rows, l2, loss, method)
        return ScoreResult(effects, used={"sample": len(sample), **_used(method)})
    total, count = np.zeros(len(inputs.labels)), np.zeros(len(inputs.labels))
    weights, trained = None, np.zeros(0, np.int64)
    for half in draw_holdout(inputs.labels, inputs.number("holdout"), inputs.seed):
        outside = np.ones(len(inputs.labels), np.bool_)
        outside[half] = False
        others = np.flatnonzero(outside)
        # Drawn from these, so that the head sees every class that they hold.
        trained = others[stratified_sample(inputs.labels[others], min(SAMPLE, len(others)), seed=inputs.seed)]
        weights = head(trained, weights)
        held = HeadBlocks(features, logits, inputs.labels, weights, teacher=False, device=device, samples=half)
        direction = removal_direction(_head_rows(inputs, features, logits, weights, trained), held, l2, loss)
        total += removal_effects(blocks(weights), direction, loss) / len(others) * outside
        count += outside
    return ScoreResult(_signed(inputs, total / count), used={"sample": len(trained)})


def _head_rows(
    inputs: ScoreInputs, features: Float32Array, logits: Float32Array, weights: torch.Tensor | None, samples: IntArray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features and logits of a head in float64, and labels, of some samples."""
    x, z = gather_rows(features, samples), gather_rows(logits, samples)
    return _rows(x, inputs), _logits(inputs, x, z, weights), _tensor(inputs.labels[samples], inputs)


def _signed(inputs: ScoreInputs, effects: FloatArray) -> FloatArray:
    return np.abs(effects) if inputs.options["kind"] == "absolute" else effects


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
    by_class = [order[members] for members in group_by_class(labels[order]).values()]
    drawn = [members[: 2 * count] for members, count in zip(by_class, each, strict=True)]
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


def _self_influence(inputs: ScoreInputs, features: Float32Array, logits: Float32Array) -> ScoreResult:
    method = _self_method(inputs, features, logits)
    weights = _head(inputs, features, logits, inputs.labels)
    ranks = inputs.distributed
    own = ranks.share(np.arange(len(inputs.labels), dtype=np.int64))
    part = slice(int(own[0]), int(own[-1]) + 1)
    effect = head_self_influence(
        _rows(features[part], inputs),
        _logits(inputs, features[part], logits[part], weights),
        _tensor(inputs.labels[part], inputs),
        l2=inputs.number("l2"),
        method=method,
        reduce=None if ranks.world_size == 1 else ranks.sum,
        **_distillation(inputs, logits[part]),
    )
    return ScoreResult(_array(ranks.gather(effect)), used=_used(method))


def _self_method(inputs: ScoreInputs, features: Float32Array, logits: Float32Array) -> str:
    """Return the `method` of `head_self_influence` that the option `hessian` asks for."""
    asked = str(inputs.options["hessian"])
    if asked == "kronecker":
        return asked
    classes = logits.shape[1] if inputs.options["polish"] == "no" else int(inputs.labels.max()) + 1
    if asked == "auto":
        return self_method(classes, features.shape[1])
    weights = classes * (features.shape[1] + 1)
    return exact_method(weights, len(inputs.labels), inputs.distributed.world_size, inputs.device)


def _used(method: str) -> dict[str, OptionValue]:
    return {"hessian": "kronecker" if method == "kronecker" else "exact"}


def _head(
    inputs: ScoreInputs,
    features: Float32Array,
    logits: Float32Array,
    labels: IntArray,
    start: torch.Tensor | None = None,
    tol: float = 1e-8,
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
        tol=tol,
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
