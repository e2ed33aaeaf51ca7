"""Scores: one number a training sample, higher = harder = kept first by the `hard` rule.

A new score is one function and one entry in SCORES.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kdfast.data.stateless_random import Purpose, hash64, unit
from kdfast.prune.rules.base import Option
from kdfast.prune.scores import hardness, influence, trajectory
from kdfast.prune.scores.base import (
    MAKE_CACHE,
    MAKE_DYNAMICS,
    Method,
    Scored,
    ScoreInputs,
    require_fit,
    require_sound,
    unknown,
)

__all__ = ["MAKE_CACHE", "MAKE_DYNAMICS", "SCORES", "Method", "ScoreInputs", "Scored", "method_named", "score"]

CACHE, DYNAMICS = frozenset({"cache"}), frozenset({"dynamics"})


def random_score(inputs: ScoreInputs) -> Scored:
    """Independent uniform numbers: keeping the highest draws a random subset.

    A sample's number depends on the seed and its index alone, so subsets of growing size are nested.
    """
    return Scored(unit(hash64(Purpose.SCORE, inputs.seed, np.arange(len(inputs.labels), dtype=np.int64))))


def d2(inputs: ScoreInputs) -> Scored:
    """The score that D2's graph starts from; the graph is in the rule `d2`.

    Source:
        Maharana et al., D2 Pruning: Message Passing for Balancing Diversity and Difficulty in Data Pruning, ICLR 2024,
        which takes forgetting, the area under the margin or others as the data needs.
    """
    chosen = SCORES[str(inputs.options["score"])]
    return chosen.compute(dataclasses.replace(inputs, options=chosen.complete({})))


_METHODS = (
    Method("random", random_score, frozenset(), "hard", "independent uniform numbers"),
    Method(
        "forgetting",
        trajectory.forgetting,
        DYNAMICS,
        "hard",
        "how often a sample went from right to wrong",
        trajectory.FORGETTING_OPTIONS,
    ),
    Method("grand", hardness.grand, CACHE | DYNAMICS, "hard", "norm of the sample's gradient", hardness.GRAND_OPTIONS),
    Method("el2n", hardness.el2n, CACHE | DYNAMICS, "hard", "length of the error of p", hardness.EL2N_OPTIONS),
    Method(
        "memorization",
        trajectory.memorization,
        DYNAMICS,
        "hard",
        "accuracy with the sample in training minus without it",
        trajectory.MEMORIZATION_OPTIONS,
    ),
    Method(
        "moderate",
        hardness.moderate,
        CACHE | DYNAMICS,
        "moderate",
        "distance of the features to the class's centre",
        hardness.MODERATE_OPTIONS,
    ),
    Method(
        "d2",
        d2,
        CACHE | DYNAMICS,
        "d2",
        "a score for D2's graph",
        {"score": Option("el2n", "which score to start from", choices=("el2n", "aum", "forgetting"))},
    ),
    Method("dual", trajectory.dual, DYNAMICS, "dual", "difficulty times uncertainty early on", trajectory.DUAL_OPTIONS),
    Method("ccs", trajectory.aum, DYNAMICS, "strata", "minus the area under the margin, for strata"),
    Method("aum", trajectory.aum, DYNAMICS, "hard", "minus the area under the margin"),
    Method(
        "influence",
        influence.influence,
        CACHE,
        "hard",
        "change of the validation loss when the sample is removed",
        influence.OPTIONS,
    ),
)
SCORES: dict[str, Method] = {method.name: method for method in _METHODS}


def method_named(name: str) -> Method:
    """A method of SCORES.

    Raises:
        UsageError: If there is no such method; the nearest name is suggested.
    """
    if name not in SCORES:
        unknown("no pruning method is named", name, SCORES)
    return SCORES[name]


def score(method: str, inputs: ScoreInputs) -> Scored:
    """Compute one score by name.

    Args:
        method: A key of `SCORES`.
        inputs: What it is computed from.

    Returns:
        The score, with the options it used.

    Raises:
        UsageError: If there is no such method or option (the nearest name is suggested), a value is out of range, or
            an input is missing (the command that makes it is named).
        DataError: If inputs do not fit each other or are not finite, or dynamics lack what the score needs.
    """
    chosen = method_named(method)
    options = chosen.complete(inputs.options)
    require_fit(inputs)
    scored = chosen.compute(dataclasses.replace(inputs, options=options))
    for name, values in {method: scored.values, **scored.extras}.items():
        require_sound(values, len(inputs.labels), name)
    return dataclasses.replace(scored, used={**options, **scored.used})
