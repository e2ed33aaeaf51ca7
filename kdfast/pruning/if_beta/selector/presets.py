"""The presets of IF-Beta: the options of each, and the learner that they describe.

`kdfast` is the method of this package; `paper` is the published one. They share scores, rewards, sampler, evaluator and
checkpoint, so each can rank by any score, and both can be compared on the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

from kdfast.pruning.if_beta.estimators import ESTIMATORS, ScoreFunction
from kdfast.pruning.if_beta.learner import Balance, IFBeta
from kdfast.pruning.if_beta.proxy import PROXIES, Bottleneck, Linear, Projection, Proxy, ProxyTrainingConfig
from kdfast.pruning.if_beta.reward import REWARDS
from kdfast.pruning.if_beta.scores import SAMPLE_SCORES
from kdfast.pruning.if_beta.search import Schedule
from kdfast.pruning.if_beta.stages import MAX_TAU, MIN_TAU, TwoStages
from kdfast.pruning.options import Option, OptionValue
from kdfast.pruning.scores.registry import SCORES

DEFAULT_PRESET = "kdfast"

# The proxies of the published method: one pass over the subset.
_ONE_PASS = ProxyTrainingConfig(steps=None, lr=1e-3, weight_decay=0.0, alpha=0.5)

_PRESET = Option(
    DEFAULT_PRESET, "kdfast: the method of kdfast; paper: the published method", choices=("kdfast", "paper")
)
_HELD = Option(IFBeta.held_share, "share of each class to hold out", 1e-6, 0.5)
_CANDIDATES = Option(IFBeta.candidates, "final draws; the best on the held-out samples is kept", 1, 1000, True)


def _score(default: str) -> Option:
    return Option(default, "score to rank by, of this method or any other", choices=(*SAMPLE_SCORES, *SCORES))


OPTIONS: dict[str, dict[str, Option]] = {
    "kdfast": {
        "preset": _PRESET,
        "score": _score("self"),
        "proxy": Option("projection", "network trained in the inner loop", choices=tuple(PROXIES)),
        "width": Option(
            None, "of the projection or the hidden layer; automatic: a quarter of the features, or 8", 1, 1e5, True
        ),
        "reward": Option("kd", "measure to maximize on the held-out samples", choices=tuple(REWARDS)),
        "estimator": Option("crn", "estimator of the reward's gradient", choices=tuple(ESTIMATORS)),
        "steps": Option(Schedule.steps, "maximum number of steps of the search", 1, 10_000, True),
        "lr": Option(Schedule.lr, "step size of the search in (ln a, ln b)", 1e-6, 10),
        "inner_steps": Option(ProxyTrainingConfig.steps, "training steps of each proxy", 1, 1e6, True),
        "l2": Option(ProxyTrainingConfig.weight_decay, "penalty on the proxies' weights", 0, 1e6),
        "alpha": Option(ProxyTrainingConfig.alpha, "weight of the teacher's term in the proxies' loss", 0, 1),
        "held": _HELD,
        "candidates": _CANDIDATES,
    },
    "paper": {
        "preset": _PRESET,
        "score": _score("influence-fvm"),
        "mu_step": Option(TwoStages.mu_step, "distance of the modes that the first stage compares", 0.001, 1),
        "tau": Option(TwoStages.tau, "sharpness of the first stage, and where the second starts", MIN_TAU, MAX_TAU),
        "repeats": Option(TwoStages.repeats, "draws of each mode in the first stage", 1, 10_000, True),
        "draws": Option(16, "draws of each step of the second stage", 2, 10_000, True),
        "steps": Option(TwoStages.steps, "steps of the second stage", 1, 10_000, True),
        "lr": Option(TwoStages.lr, "first step size of the second stage in ln tau; the last is a tenth", 1e-6, 10),
        "reward": Option("ce", "measure to maximize on the held-out samples", choices=tuple(REWARDS)),
        "alpha": Option(_ONE_PASS.alpha, "weight of the teacher's term in the proxies' loss", 0, 1),
        "held": _HELD,
        "candidates": _CANDIDATES,
    },
}


def build_learner(options: Mapping[str, OptionValue], balance: str) -> IFBeta:
    """Return the learner of a preset.

    Args:
        options: Every option of the preset, with its value.
        balance: See `IFBeta`.
    """

    def number(name: str) -> float:
        return float(cast(float, options[name]))

    shared = IFBeta(
        score=str(options["score"]),
        reward=str(options["reward"]),
        balance=cast(Balance, balance),
        held_share=number("held"),
        candidates=int(number("candidates")),
    )
    if options["preset"] == "paper":
        lr = number("lr")
        return dataclasses.replace(
            shared,
            proxy=Linear(),
            estimator=ScoreFunction(int(number("draws")), natural=False),
            budget=dataclasses.replace(_ONE_PASS, alpha=number("alpha")),
            schedule=TwoStages(
                number("mu_step"), number("tau"), int(number("repeats")), int(number("steps")), lr, lr / 10
            ),
        )
    proxy: str | Proxy = str(options["proxy"])
    if options["width"] is not None:
        width = int(number("width"))
        proxy = Projection(width) if proxy == "projection" else Bottleneck(width)
    return dataclasses.replace(
        shared,
        proxy=proxy,
        estimator=str(options["estimator"]),
        budget=ProxyTrainingConfig(steps=int(number("inner_steps")), weight_decay=number("l2"), alpha=number("alpha")),
        schedule=Schedule(steps=int(number("steps")), lr=number("lr")),
    )
