"""IF-Beta as a method of `kdfast prune` and `kdfast sweep`: from a cache and options to a subset."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray
from kdfast.errors import SubsetError
from kdfast.prune.if_beta import cost
from kdfast.prune.if_beta.gradient import ESTIMATORS
from kdfast.prune.if_beta.inner import Budget
from kdfast.prune.if_beta.inputs import check_fraction
from kdfast.prune.if_beta.learner import IFBeta
from kdfast.prune.if_beta.proxy import PROXIES, Bottleneck, Projection, Proxy
from kdfast.prune.if_beta.reward import REWARDS
from kdfast.prune.if_beta.scores import SAMPLE_SCORES, mean_logits
from kdfast.prune.if_beta.search import Schedule
from kdfast.prune.if_beta.summary import summarize
from kdfast.prune.rules.base import Option
from kdfast.prune.selector import Chooser, ChooserInputs
from kdfast.teacher.cache import TeacherCache

# More views say little more about a rank, and each is a pass over the cache.
_VIEWS = 8
_BLOCK_ROWS = 1 << 16

OPTIONS = {
    "score": Option("self", "what is ranked", choices=tuple(SAMPLE_SCORES)),
    "proxy": Option("projection", "what is trained in the inner loop", choices=tuple(PROXIES)),
    "width": Option(
        None, "of the projection or the hidden layer; by default a quarter of the features, or 8", 1, 1e5, True
    ),
    "reward": Option("kd", "what is maximised on the held-out part", choices=tuple(REWARDS)),
    "estimator": Option("crn", "how its gradient is estimated", choices=tuple(ESTIMATORS)),
    "steps": Option(Schedule.steps, "of the search, at most", 1, 10_000, True),
    "lr": Option(Schedule.lr, "step size of the search in (ln a, ln b)", 1e-6, 10),
    "inner_steps": Option(Budget.steps, "of each proxy's training", 1, 1e6, True),
    "l2": Option(Budget.weight_decay, "penalty on the proxies' weights", 0, 1e6),
    "alpha": Option(Budget.alpha, "weight of the teacher's term in the proxies' loss", 0, 1),
    "held": Option(IFBeta.held_share, "share of each class that judges", 1e-6, 0.5),
    "candidates": Option(1, "final draws, the best of which on the held-out part is kept", 1, 1000, True),
}


def choose(inputs: ChooserInputs) -> tuple[IntArray, dict[str, Any]]:
    """Learn the policy for one fraction and draw the subset.

    Args:
        inputs: Data, cache, fraction, seed and options; its `state` is the side file of an interrupted search.

    Returns:
        int64 (m,) indices, ascending, and `summarize`'s values with the cost in per cent of one distillation.

    Raises:
        SubsetError: The fraction is 0 or 1, or leaves a class empty.
        CacheMismatch: The cache has no features.
        KdfastError: As `IFBeta.fit`.
    """
    check_fraction(inputs.fraction)
    labels, cache = inputs.source.train.labels, inputs.cache
    if len(cache) != len(labels):
        raise SubsetError(f"{cache.path} covers {len(cache)} of {len(labels)} samples: build a cache of all of them")
    # Plain tensors: the cache's arrays are mapped files, which later steps would read again and again.
    logits, features = (torch.tensor(np.asarray(x)) for x in (cache.identity_logits(), cache.features()))
    result = _learner(inputs).fit(
        logits,
        features,
        labels,
        inputs.fraction,
        inputs.seed,
        score_logits=_view_mean(cache),
        state=inputs.state,
        progress=inputs.progress,
        device=inputs.device,
    )
    height, width = inputs.source.views.size
    whole = cost.distillation_seconds(len(labels), logits.shape[1], (height, width), inputs.device)
    about = summarize(result, labels) | {
        "distillation": {"student": cost.STUDENT, "epochs": cost.EPOCHS, "seconds": whole},
        "percent_of_distillation": 100 * result.seconds / whole,
    }
    return result.ids, about


def _learner(inputs: ChooserInputs) -> IFBeta:
    given = dict(inputs.options)

    def number(name: str) -> float:
        return float(cast(float, given[name]))

    width = None if given["width"] is None else int(number("width"))
    proxy: str | Proxy = str(given["proxy"])
    if width is not None:
        proxy = Projection(width) if proxy == "projection" else Bottleneck(width)
    return IFBeta(
        score=str(given["score"]),
        proxy=proxy,
        reward=str(given["reward"]),
        estimator=str(given["estimator"]),
        budget=Budget(steps=int(number("inner_steps")), weight_decay=number("l2"), alpha=number("alpha")),
        schedule=Schedule(steps=int(number("steps")), lr=number("lr")),
        balance=cast(Literal["balanced", "equal", "unbalanced"], inputs.balance),
        held_share=number("held"),
        candidates=int(number("candidates")),
    )


def _view_mean(cache: TeacherCache) -> Tensor:
    """`mean_logits` of the cache's first views, a block of samples at a time."""
    views = min(cache.n_views, _VIEWS)
    blocks = []
    for start in range(0, len(cache), _BLOCK_ROWS):
        ids = cache.coverage[start : start + _BLOCK_ROWS]
        blocks.append(mean_logits(cache.lookup(ids, np.full_like(ids, view)) for view in range(views)))
    return torch.cat(blocks)


IF_BETA = Chooser(choose, "draws by a Beta density over influence ranks, learned on proxies", OPTIONS, check_fraction)
