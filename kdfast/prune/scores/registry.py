"""The registry of scores: one value per training sample, higher = harder = kept first by the rule `hard`.

A new score is one function and one entry in SCORES.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kdfast.data.stateless_random import Purpose, hash64, uniform
from kdfast.errors import look_up
from kdfast.prune.options import Option, complete_options
from kdfast.prune.scores import el2n_grand, influence, memorization, moderate, trajectory, windows
from kdfast.prune.scores.base import Score, ScoreInputs, ScoreResult, check_inputs, check_values

_CACHE, _DYNAMICS = frozenset({"cache"}), frozenset({"dynamics"})


def random(inputs: ScoreInputs) -> ScoreResult:
    """Independent uniform numbers: keeping the highest is drawing a random subset.

    A sample's number depends only on the seed and its index, so larger subsets contain the smaller ones.
    """
    return ScoreResult(uniform(hash64(Purpose.SCORE, inputs.seed, np.arange(len(inputs.labels), dtype=np.int64))))


def d2(inputs: ScoreInputs) -> ScoreResult:
    """The score that D2 starts from; the rule `d2` adds the graph.

    Source:
        Maharana et al., D2 Pruning: Message Passing for Balancing Diversity and Difficulty in Data Pruning, ICLR 2024,
        which starts from forgetting, the area under the margin or other scores, depending on the data.
    """
    name = str(inputs.options["score"])
    options = complete_options(name, SCORES[name].options, {})
    return SCORES[name].compute(dataclasses.replace(inputs, options=options))


SCORES: dict[str, Score] = {
    "random": Score(random, "independent uniform numbers"),
    "forgetting": Score(
        trajectory.forgetting,
        "how often a sample changed from correct to wrong during training",
        _DYNAMICS,
        options=trajectory.FORGETTING_OPTIONS,
    ),
    "grand": Score(
        el2n_grand.grand,
        "norm of the gradient of the sample's loss",
        _CACHE | _DYNAMICS,
        options=el2n_grand.GRAND_OPTIONS,
    ),
    "el2n": Score(
        el2n_grand.el2n_score,
        "L2 norm of the error vector: predicted probabilities minus one-hot label",
        _CACHE | _DYNAMICS,
        options=el2n_grand.EL2N_OPTIONS,
    ),
    "memorization": Score(
        memorization.memorization,
        "accuracy of runs that trained on the sample minus accuracy of runs that did not",
        _DYNAMICS,
        options=memorization.OPTIONS,
    ),
    "moderate": Score(
        moderate.moderate,
        "distance of the features to the center of their class",
        _CACHE | _DYNAMICS,
        rule="moderate",
        options=moderate.OPTIONS,
    ),
    "d2": Score(
        d2,
        "the score that the option score names, by default el2n; the rule d2 adds diversity",
        _CACHE | _DYNAMICS,
        rule="d2",
        options={"score": Option("el2n", "score to start from", choices=("el2n", "aum", "forgetting"))},
    ),
    "dual": Score(
        windows.dual,
        "difficulty times uncertainty early in training",
        _DYNAMICS,
        rule="dual",
        options=windows.DUAL_OPTIONS,
    ),
    "dyn-unc": Score(
        windows.dyn_unc,
        "how much the probability of the label varies within windows of epochs",
        _DYNAMICS,
        options=windows.DYN_UNC_OPTIONS,
    ),
    "ccs": Score(
        trajectory.aum,
        "the same as aum, but selected by the rule strata",
        _DYNAMICS,
        rule="strata",
        options=trajectory.AUM_OPTIONS,
    ),
    "aum": Score(trajectory.aum, "minus the area under the margin", _DYNAMICS, options=trajectory.AUM_OPTIONS),
    "influence": Score(
        influence.influence,
        "change of a loss when the sample is removed from training, without retraining",
        _CACHE,
        options=influence.OPTIONS,
    ),
}


def get_score(name: str) -> Score:
    """Return a score by name.

    Raises:
        UsageError: There is no such score; the nearest name is suggested.
    """
    return look_up(SCORES, name, "score")


def compute_score(name: str, inputs: ScoreInputs) -> ScoreResult:
    """Compute a score.

    Args:
        name: A key of `SCORES`.
        inputs: What to compute it from.

    Returns:
        The scores, with the value of every option.

    Raises:
        UsageError: The score or an option does not exist (the nearest name is suggested), a value is out of range, or
            an input is missing (the message names the command that makes it).
        DataError: The inputs do not fit each other or are not finite, or the dynamics lack what the score needs.
    """
    score = get_score(name)
    options = complete_options(name, score.options, inputs.options)
    inputs = check_inputs(inputs)
    result = score.compute(dataclasses.replace(inputs, options=options))
    for what, values in {name: result.values, **result.extras}.items():
        check_values(values, len(inputs.labels), what)
    return dataclasses.replace(result, used={**options, **result.used})
