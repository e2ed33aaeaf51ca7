"""IF-Beta as a subset selector."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.data.holdout import stratified_sample
from kdfast.data.stateless_random import IntArray
from kdfast.errors import SubsetError, UsageError
from kdfast.pruning.candidates import find_candidates
from kdfast.pruning.if_beta.inputs import check_fraction
from kdfast.pruning.if_beta.scores import AT_OPTIMUM, INFLUENCES, mean_logits
from kdfast.pruning.if_beta.selector.costs import measure_costs
from kdfast.pruning.if_beta.selector.large import rows_of_cache, streamed_scores
from kdfast.pruning.if_beta.selector.presets import DEFAULT_PRESET, OPTIONS, build_learner
from kdfast.pruning.if_beta.selector.record import summarize
from kdfast.pruning.options import OptionValue
from kdfast.pruning.scores.influence import DEFAULT_L2
from kdfast.pruning.scores.sampled_head import LARGE, SAMPLE, self_method
from kdfast.pruning.selector import SelectorInputs, SubsetSelector
from kdfast.teacher.cache import TeacherCache

# More views barely change the ranks, and each is a pass over the cache.
_MAX_VIEWS = 8
_BLOCK_ROWS = 1 << 16


def select(inputs: SelectorInputs) -> tuple[IntArray, dict[str, Any]]:
    """Learn the policy for one fraction and draw the subset.

    Args:
        inputs: Data, cache, fraction, seed, options and scores; `state` is the checkpoint file of the search.

    Returns:
        int64 (m,) indices, ascending; and `summarize`'s values with `fixed_settings` and the costs.

    Raises:
        SubsetError: The fraction is 0 or 1 or leaves a class empty, or the cache does not cover the training split.
        UsageError: A large split has an option that needs all samples in memory.
        CacheMismatch: The cache has no features.
        KdfastError: As `IFBeta.fit`.
    """
    labels, cache, scores = inputs.source.train.labels, inputs.cache, inputs.scores
    candidates = find_candidates(labels, inputs.fraction, inputs.balance, inputs.exclude)
    check_fraction(candidates.fraction)
    if len(cache) != len(labels):
        raise SubsetError(f"{cache.path} covers {len(cache)} of {len(labels)} samples: build a cache of all of them")
    own, rows = labels if candidates.are_all else labels[candidates.ids], None
    values = None if scores is None else scores.scores
    found: dict[str, int | str] = {}
    started = time.perf_counter()
    if len(own) > LARGE:
        if inputs.options["candidates"] != 1:
            raise UsageError(
                f"option candidates={inputs.options['candidates']}: of more than {LARGE} samples, the search sees a "
                "sample and keeps its first draw: use candidates=1"
            )
        rows = stratified_sample(own, SAMPLE, seed=inputs.seed)
        found["searched"] = len(rows)
        values = streamed_scores(inputs, min(cache.n_views, _MAX_VIEWS)) if values is None else values
    # Copies in memory: the cache's arrays are memory-mapped, and the search reads them repeatedly.
    logits, features = rows_of_cache(cache, candidates.ids if rows is None else candidates.ids[rows])
    score_seconds = time.perf_counter() - started
    approximate = self_method(logits.shape[1], features.shape[1]) == "kronecker"
    if scores is None and inputs.options["score"] == "self" and approximate:
        found["influence_hessian"] = "kronecker"
    labels = own
    result = build_learner(inputs.options, inputs.balance).fit(
        logits,
        features,
        labels,
        candidates.fraction,
        inputs.seed,
        score_logits=_mean_over_views(cache, candidates.ids, inputs.device) if values is None else None,
        scores=None if values is None else candidates.take(values),
        rows=rows,
        state=inputs.state,
        progress=inputs.progress,
        device=inputs.device,
    )
    if rows is not None and scores is None:
        result = dataclasses.replace(result, score_seconds=score_seconds)
    record = (
        summarize(result, labels, candidates.ids)
        | fixed_settings(inputs.options)
        | {"preset": inputs.options["preset"]}
        | found
    )
    return candidates.ids[result.ids], record | measure_costs(inputs, result)


def fixed_settings(options: Mapping[str, OptionValue]) -> dict[str, float | str]:
    """Return what determines a selection but is no option; it is part of idx.json and of the keys of a sweep's rows.

    Args:
        options: Options by name; a missing one has its default.

    Returns:
        `influence_l2`, the penalty behind an influence score, and `influence_head`, "optimum" for the scores that fit a
        head of their own; nothing for the other scores.
    """
    score = options.get("score", OPTIONS[str(options.get("preset", DEFAULT_PRESET))]["score"].default)
    penalty: dict[str, float | str] = {"influence_l2": DEFAULT_L2} if score in INFLUENCES else {}
    return {**penalty, "influence_head": "optimum"} if score in AT_OPTIMUM else penalty


IF_BETA = SubsetSelector(
    select,
    "draws by a Beta density over influence ranks, learned on proxies",
    OPTIONS[DEFAULT_PRESET],
    check_fraction,
    presets=OPTIONS,
)


def _mean_over_views(cache: TeacherCache, samples: IntArray, device: torch.device | str) -> Tensor | None:
    """Return `mean_logits` of samples over the first views of the cache, computed in blocks on the device.

    None for a cache of the most probable classes: the scores are then those of the unaugmented samples.
    """
    if cache.top_k is not None:
        return None
    views = min(cache.n_views, _MAX_VIEWS)
    blocks = []
    for start in range(0, len(samples), _BLOCK_ROWS):
        ids = samples[start : start + _BLOCK_ROWS]
        blocks.append(mean_logits(cache.lookup(ids, np.full_like(ids, view)).to(device) for view in range(views)))
    return torch.cat(blocks)
