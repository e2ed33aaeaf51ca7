"""What changes if influence and IF-Beta's search see a sample of the data, as they do above 131,072 samples.

    kdfast cache --data cifar-10-batches-py --teacher teacher.pt --views 1 --out cache
    python bench/sampling_bias.py --data cifar-10-batches-py --cache cache [--fraction 0.1] [--seed 0]

- head: Spearman's correlation of `influence` (kind=removal) with the head of a stratified sample and with that of all
  samples; beside it that of another seed, which draws other validation samples.
- search: the policy (a, b) that IF-Beta finds on a sample, by ranks of the score `residual`, and its reward on all
  samples less that of the policy found on all: mean of 16 paired draws and half width of the 95% interval.

Writes bench/results/sampling_bias_<data>.json.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import table, write_results
from scipy.stats import spearmanr

from kdfast.data.holdout import hold_out, stratified_sample
from kdfast.data.readers.registry import open_source
from kdfast.pruning.if_beta.evaluator import PolicyEvaluator
from kdfast.pruning.if_beta.policy import StratifiedSampler, average_ranks
from kdfast.pruning.if_beta.proxy import PROXIES, ProxyData
from kdfast.pruning.if_beta.reward import REWARDS
from kdfast.pruning.if_beta.scores import SAMPLE_SCORES, HeadInputs
from kdfast.pruning.if_beta.selector.presets import build_learner
from kdfast.pruning.if_beta.selector.select import IF_BETA
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores import influence
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score
from kdfast.teacher.cache import TeacherCache

HEADS = (1 / 4, 1 / 15)
SEARCHES = (1 / 2, 1 / 4)
STEP = 1 << 20  # of the comparison, beyond those of the searches


def head_rows(labels: np.ndarray, logits: np.ndarray, features: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Compare influence with the heads of samples and of all."""

    def scores(draw: int, sample: int | None = None) -> FloatArray:
        inputs = ScoreInputs(labels, draw, logits, features)
        limit = len(labels) if sample is None else 0
        with mock.patch.object(influence, "LARGE", limit), mock.patch.object(influence, "SAMPLE", sample):
            return compute_score("influence", inputs).values

    whole, rows = scores(seed), []
    for share in HEADS:
        sample = round(share * len(labels))
        found = spearmanr(whole, scores(seed, sample)).statistic
        rows.append({"what": "head of a sample", "samples": sample, "correlation": round(float(found), 4)})
    found = spearmanr(whole, scores(seed + 1)).statistic
    return [*rows, {"what": "another seed", "samples": len(labels), "correlation": round(float(found), 4)}]


def search_rows(
    labels: np.ndarray, logits: np.ndarray, features: np.ndarray, fraction: float, seed: int
) -> list[dict[str, Any]]:
    """Compare the policies of searches on samples and on all."""
    method = build_learner(IF_BETA.complete_options("if-beta", {}), "balanced")
    proxy = PROXIES[method.proxy]() if isinstance(method.proxy, str) else method.proxy
    z, h, y = torch.from_numpy(logits), torch.from_numpy(features), torch.from_numpy(labels)
    pool, held_out = hold_out(labels, logits.shape[1], seed=seed)
    scores = SAMPLE_SCORES["residual"](HeadInputs(z, h, y, held_out))
    data = ProxyData(proxy.transform(h, seed), y, z)
    evaluator = PolicyEvaluator(proxy, REWARDS[method.reward], method.budget, data, held_out, seed)
    ranks = average_ranks(scores, labels)
    sampler = StratifiedSampler.from_ranks(ranks[pool], pool, labels[pool], round(fraction * len(pool)))

    def find(rows: np.ndarray | None) -> tuple[float, float]:
        of = slice(None) if rows is None else rows
        found = method.fit(logits[of], features[of], labels, fraction, seed, scores=scores, rows=rows)
        return found.learned

    whole = find(None)
    rows = [search_row(len(labels), whole, evaluator.compare(sampler, whole, (1.0, 1.0), STEP), "uniform")]
    for share in SEARCHES:
        sample = stratified_sample(labels, round(share * len(labels)), seed=seed)
        policy = find(sample)
        rows.append(search_row(len(sample), policy, evaluator.compare(sampler, policy, whole, STEP), "all samples"))
    return rows


def search_row(samples: int, policy: tuple[float, float], compared: Any, other: str) -> dict[str, Any]:
    """Return the row of a search."""
    return {
        "what": "search",
        "samples": samples,
        "a": round(policy[0], 3),
        "b": round(policy[1], 3),
        "reward less that of": other,
        "difference": round(compared.difference, 4),
        "half width": round(compared.half_width, 4),
    }


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = open_source(options.data)
    cache = TeacherCache.open(options.cache, source=source)
    labels = source.train.labels
    logits, features = (np.array(array) for array in (cache.identity_logits(), cache.features()))
    heads = head_rows(labels, logits, features, options.seed)
    print(table(heads), flush=True)
    searches = search_rows(labels, logits, features, options.fraction, options.seed)
    print(table(searches))
    write_results(f"sampling_bias_{source.kind}", heads + searches, fraction=options.fraction, seed=options.seed)


if __name__ == "__main__":
    main()
