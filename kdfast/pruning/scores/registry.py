"""The registry of scores: one value per training sample, higher = harder = kept first by the rule `hard`.

A new score is one function and one entry in SCORES.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kdfast.data.stateless_random import Purpose, hash64, uniform
from kdfast.errors import UsageError, look_up
from kdfast.pruning.options import Option, complete_options
from kdfast.pruning.scores import el2n_grand, fvm, influence, medium, memorization, moderate, tdds, trajectory, windows
from kdfast.pruning.scores.base import Score, ScoreInputs, ScoreResult, check_inputs, check_values

_CACHE, _DYNAMICS = frozenset({"cache"}), frozenset({"dynamics"})


def random(inputs: ScoreInputs) -> ScoreResult:
    """Independent uniform numbers: keeping the highest is drawing a random subset.

    A sample's number depends only on the seed and its index, so larger subsets contain the smaller ones.
    """
    return ScoreResult(uniform(hash64(Purpose.SCORE, inputs.seed, np.arange(len(inputs.labels), dtype=np.int64))))


def d2(inputs: ScoreInputs) -> ScoreResult:
    """The score that D2 starts from; the rule `d2` adds the graph.

    The other options are those of that score. The extra `aum` is minus the area under the margin, for the rule's
    `cut_by=aum`; it needs dynamics, and `margin` applies to it too.

    Raises:
        UsageError: An option does not belong to the score to start from.

    Source:
        Maharana et al., D2 Pruning: Message Passing for Balancing Diversity and Difficulty in Data Pruning, ICLR 2024,
        which starts from forgetting, the area under the margin or other scores, depending on the data.
    """
    name = str(inputs.options["score"])
    given = {option: value for option, value in inputs.options.items() if option != "score" and value is not None}
    for option, value in given.items():
        if option not in SCORES[name].options and option not in trajectory.AUM_OPTIONS:
            raise UsageError(
                f"option {option}={value}: the score {name}, which d2 starts from, does not have it: omit it, or "
                "choose a score that has it by the option score"
            )

    def compute(start: str) -> ScoreResult:
        own = {option: value for option, value in given.items() if option in SCORES[start].options}
        options = complete_options(start, SCORES[start].options, own)
        result = SCORES[start].compute(dataclasses.replace(inputs, options=options))
        return dataclasses.replace(result, used={**options, **result.used})

    result = compute(name)
    extras = {} if inputs.dynamics is None else {"aum": compute("aum").values}
    return dataclasses.replace(result, extras={**result.extras, **extras})


def _d2_options() -> dict[str, Option]:
    starts = {
        "el2n": el2n_grand.EL2N_OPTIONS,
        "aum": trajectory.AUM_OPTIONS,
        "forgetting": trajectory.FORGETTING_OPTIONS,
    }
    options = {"score": Option("el2n", "score to start from", choices=tuple(starts))}
    for name, own in starts.items():
        for option, declared in own.items():
            default = "" if declared.default is None else f"; automatic: {declared.default}"
            user = f"score={name} or cut_by=aum of the rule d2" if name == "aum" else f"score={name}"
            summary = f"with {user}: {declared.summary}{default}"
            options[option] = dataclasses.replace(declared, default=None, summary=summary)
    return options


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
        options=_d2_options(),
        extras=frozenset({"aum"}),
    ),
    "dual": Score(
        windows.dual,
        "difficulty times uncertainty early in training",
        _DYNAMICS,
        rule="dual",
        options=windows.DUAL_OPTIONS,
        extras=frozenset({"mean_p"}),
    ),
    "dyn-unc": Score(
        windows.dyn_unc,
        "how much the probability of the label varies within windows of epochs",
        _DYNAMICS,
        options=windows.DYN_UNC_OPTIONS,
    ),
    "tdds": Score(
        tdds.tdds,
        "how unevenly predictions change from epoch to epoch",
        _DYNAMICS,
        options=tdds.OPTIONS,
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
    "influence-fvm": Score(
        fvm.influence_fvm,
        "second-order influence over all weights of a teacher that was flattened on held-out samples",
        frozenset({"teacher"}),
        options=fvm.OPTIONS,
    ),
    "medium": Score(
        medium.medium, "cross-entropy of the teacher, selected by the middle of its ranking", _CACHE, rule="moderate"
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
