"""IF-Beta as a subset selector for `kdfast prune` and `kdfast sweep`, and its provenance in idx.json."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray
from kdfast.errors import SubsetError
from kdfast.nets import build_net
from kdfast.ops.float32 import full_float32
from kdfast.ops.kd_loss import kd_loss
from kdfast.prune.if_beta.estimators import ESTIMATORS
from kdfast.prune.if_beta.inputs import check_fraction
from kdfast.prune.if_beta.learner import Balance, IFBeta, IFBetaResult
from kdfast.prune.if_beta.proxy import PROXIES, Bottleneck, Projection, Proxy, ProxyTrainingConfig
from kdfast.prune.if_beta.reward import REWARDS
from kdfast.prune.if_beta.scores import AT_OPTIMUM, INFLUENCES, SAMPLE_SCORES, mean_logits
from kdfast.prune.if_beta.search import Schedule
from kdfast.prune.options import Option, OptionValue
from kdfast.prune.rules.base import FloatArray
from kdfast.prune.scores.influence import DEFAULT_L2
from kdfast.prune.selector import SelectorInputs, SubsetSelector
from kdfast.teacher.cache import TeacherCache

# More views barely change the ranks, and each is a pass over the cache.
_MAX_VIEWS = 8
_BLOCK_ROWS = 1 << 16
_BINS = 40
_EXTREMES = 10

# The distillation that the cost of a search is compared with.
_STUDENT, _EPOCHS, _BATCH = "resnet32", 240, 64
_BATCH_PIXELS = 32 * 32 * _BATCH
_WARMUP_STEPS, _TIMED_STEPS = 2, 5

OPTIONS = {
    "score": Option("self", "score to rank by", choices=tuple(SAMPLE_SCORES)),
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
    "held": Option(IFBeta.held_share, "share of each class to hold out", 1e-6, 0.5),
    "candidates": Option(IFBeta.candidates, "final draws; the best on the held-out samples is kept", 1, 1000, True),
}


def select(inputs: SelectorInputs) -> tuple[IntArray, dict[str, Any]]:
    """Learn the policy for one fraction and draw the subset.

    Args:
        inputs: Data, cache, fraction, seed and options; `state` is the checkpoint file of the search.

    Returns:
        int64 (m,) indices, ascending; and `summarize`'s values with `fixed_settings` and the cost relative to one
        distillation.

    Raises:
        SubsetError: The fraction is 0 or 1 or leaves a class empty, or the cache does not cover the training split.
        CacheMismatch: The cache has no features.
        KdfastError: As `IFBeta.fit`.
    """
    check_fraction(inputs.fraction)
    labels, cache = inputs.source.train.labels, inputs.cache
    if len(cache) != len(labels):
        raise SubsetError(f"{cache.path} covers {len(cache)} of {len(labels)} samples: build a cache of all of them")
    # Copies in memory: the cache's arrays are memory-mapped, and the search reads them repeatedly.
    logits, features = (torch.tensor(np.asarray(x)) for x in (cache.identity_logits(), cache.features()))
    result = _learner(inputs).fit(
        logits,
        features,
        labels,
        inputs.fraction,
        inputs.seed,
        score_logits=_mean_over_views(cache, inputs.device),
        state=inputs.state,
        progress=inputs.progress,
        device=inputs.device,
    )
    height, width = inputs.source.view_spec.size
    seconds = distillation_seconds(len(labels), logits.shape[1], (height, width), inputs.device)
    return result.ids, summarize(result, labels) | {
        **fixed_settings(inputs.options),
        "distillation": {"student": _STUDENT, "epochs": _EPOCHS, "seconds": seconds},
        "percent_of_distillation": 100 * result.seconds / seconds,
    }


def fixed_settings(options: Mapping[str, OptionValue]) -> dict[str, float | str]:
    """Return what determines a selection but is no option; it is part of idx.json and of the keys of a sweep's rows.

    Args:
        options: Options by name; a missing one has its default.

    Returns:
        `influence_l2`, the penalty behind an influence score, and `influence_head`, "optimum" for the scores that fit a
        head of their own; nothing for the other scores.
    """
    score = options.get("score", OPTIONS["score"].default)
    penalty: dict[str, float | str] = {"influence_l2": DEFAULT_L2} if score in INFLUENCES else {}
    return {**penalty, "influence_head": "optimum"} if score in AT_OPTIMUM else penalty


IF_BETA = SubsetSelector(
    select, "draws by a Beta density over influence ranks, learned on proxies", OPTIONS, check_fraction
)


def summarize(result: IFBetaResult, labels: IntArray) -> dict[str, Any]:
    """Return the record of a search in idx.json, sufficient to draw its page without the data.

    Args:
        result: The search.
        labels: int64 (N,).

    Returns:
        JSON values: the policy and its path, rewards, the gain over the uniform policy, times, histograms of the ranks
        and scores of all and of the kept samples, class counts, and the kept samples of highest and lowest score.
    """
    gain = result.gain
    return {
        "a": result.a,
        "b": result.b,
        "learned": list(result.learned),
        "path": result.path,
        "rewards": result.rewards,
        "accuracies": result.accuracies,
        "gain": {name: getattr(gain, name) for name in gain.__dataclass_fields__},
        "trials": result.trials,
        "held_out": result.held_out,
        "chosen_of": result.candidates,
        "score_seconds": result.score_seconds,
        "search_seconds": result.search_seconds,
        "ranks": _histogram(result.u, result.ids, np.linspace(0, 1, _BINS + 1)),
        "scores": _histogram(result.scores, result.ids, _edges(result.scores)),
        "classes": {
            "all": np.bincount(labels).tolist(),
            "kept": np.bincount(labels[result.ids], minlength=int(labels.max()) + 1).tolist(),
        },
        "ends": _extremes(result, labels),
    }


@full_float32()
def distillation_seconds(
    samples: int, classes: int, size: tuple[int, int], device: torch.device | str = "cpu"
) -> float:
    """Estimate the time to distill a ResNet-32 on all samples for 240 epochs from a few timed steps.

    Args:
        samples: N.
        classes: C.
        size: Height and width of the student's inputs.
        device: Device to train on.

    Returns:
        Seconds: the median of five steps, on smaller batches for large images, times the steps of 240 epochs.
    """
    batch = max(2, min(_BATCH, _BATCH_PIXELS // (size[0] * size[1])))
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        net = build_net(_STUDENT, classes).to(device).train()
    images = torch.zeros(batch, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % classes
    teacher = torch.zeros(batch, classes, device=device)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    seconds = []
    for _ in range(_WARMUP_STEPS + _TIMED_STEPS):
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(kd_loss(net(images), labels, teacher))
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[_WARMUP_STEPS:]) * math.ceil(samples / batch) * _EPOCHS


def _learner(inputs: SelectorInputs) -> IFBeta:
    options = dict(inputs.options)

    def number(name: str) -> float:
        return float(cast(float, options[name]))

    proxy: str | Proxy = str(options["proxy"])
    if options["width"] is not None:
        width = int(number("width"))
        proxy = Projection(width) if proxy == "projection" else Bottleneck(width)
    return IFBeta(
        score=str(options["score"]),
        proxy=proxy,
        reward=str(options["reward"]),
        estimator=str(options["estimator"]),
        budget=ProxyTrainingConfig(steps=int(number("inner_steps")), weight_decay=number("l2"), alpha=number("alpha")),
        schedule=Schedule(steps=int(number("steps")), lr=number("lr")),
        balance=cast(Balance, inputs.balance),
        held_share=number("held"),
        candidates=int(number("candidates")),
    )


def _mean_over_views(cache: TeacherCache, device: torch.device | str) -> Tensor:
    """Return `mean_logits` over the first views of the cache, computed in blocks of samples on the device."""
    views = min(cache.n_views, _MAX_VIEWS)
    blocks = []
    for start in range(0, len(cache), _BLOCK_ROWS):
        ids = cache.coverage[start : start + _BLOCK_ROWS]
        blocks.append(mean_logits(cache.lookup(ids, np.full_like(ids, view)).to(device) for view in range(views)))
    return torch.cat(blocks)


def _edges(scores: FloatArray) -> FloatArray:
    """Return edges of equal bins over the central 98% of the scores; `_histogram` adds outliers to the outer bins."""
    low, high = np.quantile(scores, [0.01, 0.99])
    if not low < high:
        low, high = scores.min(), scores.max()
    return np.linspace(low, high, _BINS + 1)


def _histogram(values: FloatArray, ids: IntArray, edges: FloatArray) -> dict[str, list[float]]:
    inside = np.clip(values, edges[0], edges[-1])
    count = {name: np.histogram(part, edges)[0].tolist() for name, part in (("all", inside), ("kept", inside[ids]))}
    return {"edges": edges.tolist(), **count}


def _extremes(result: IFBetaResult, labels: IntArray) -> dict[str, list[dict[str, float]]]:
    order = result.ids[np.lexsort((result.ids, result.scores[result.ids]))]

    def rows(ids: IntArray) -> list[dict[str, float]]:
        return [
            {"id": int(i), "label": int(labels[i]), "score": float(result.scores[i]), "u": float(result.u[i])}
            for i in ids
        ]

    return {"lowest": rows(order[:_EXTREMES]), "highest": rows(order[::-1][:_EXTREMES])}
