"""Where the second stage of IF-Beta's preset paper should start: searches from several sharpnesses against a grid.

    python bench/if_beta_sharpness.py [--data cifar-10-batches-py --cache cache] [--tau 4 6 8] [--fraction 0.2]

The data are planted, three seeds of each kind: `noise` in the hardest fifth of the ranks, and `halves`, where each
class has one center for low and another for high ranks, so that uniform is best. With a cache they are those of the
teacher, ranked by self-influence. The best policy of a grid of modes and sharpnesses, the uniform policy and those
learned are compared on 64 fresh draws that they share.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import table, write_results

from kdfast.data.holdout import hold_out
from kdfast.data.readers.registry import open_source
from kdfast.pruning.if_beta.estimators import Trial
from kdfast.pruning.if_beta.evaluator import PolicyEvaluator
from kdfast.pruning.if_beta.policy import StratifiedSampler
from kdfast.pruning.if_beta.proxy import Linear, ProxyData
from kdfast.pruning.if_beta.reward import REWARDS
from kdfast.pruning.if_beta.scores import HeadInputs, self_influence
from kdfast.pruning.if_beta.selector.presets import build_learner
from kdfast.pruning.if_beta.selector.select import IF_BETA
from kdfast.pruning.if_beta.stages import beta_parameters
from kdfast.teacher.cache import TeacherCache

GRID = [beta_parameters(mu, tau) for mu in np.linspace(0, 1, 11) for tau in np.geomspace(0.5, 40, 12)]
GRID_DRAWS, FRESH_DRAWS = 8, 64
SAMPLES, CLASSES, DIM = 10_000, 5, 32


@dataclass
class Case:
    """Data to search on: float32 logits and features, int64 labels, float64 scores."""

    name: str
    logits: torch.Tensor
    features: torch.Tensor
    labels: np.ndarray
    scores: np.ndarray


def planted(kind: str, seed: int) -> Case:
    """Return data with noise in the hardest fifth, except for the held-out set, or with two centers for each class."""
    rng = np.random.default_rng(seed)
    labels, scores = np.arange(SAMPLES, dtype=np.int64) % CLASSES, rng.random(SAMPLES)
    noise = rng.normal(size=(SAMPLES, DIM))
    if kind == "noise":
        means = rng.normal(size=(CLASSES, DIM))
        hard = scores > 0.8
        hard[hold_out(labels, CLASSES)[1]] = False
        features = means[(labels + hard) % CLASSES] + 1.5 * noise
        logits = ((means[labels] + 1.5 * noise) @ means.T - (means**2).sum(1) / 2) / 1.5**2
        logits[hard] *= -1
    else:
        centers = rng.normal(size=(2, CLASSES, DIM))
        features = centers[(scores > 0.5).astype(int), labels] + noise
        logits = np.logaddexp(*(-((features[:, None] - center) ** 2).sum(2) / 2 for center in centers))
        logits -= logits.max(1, keepdims=True)
    return Case(f"{kind} {seed}", torch.tensor(logits).float(), torch.tensor(features).float(), labels, scores)


def cached(data: str, folder: str) -> Case:
    """Return a teacher's cached logits and features, ranked by self-influence."""
    source = open_source(data)
    cache, labels = TeacherCache.open(folder, source=source), source.train.labels
    logits, features = (torch.tensor(np.asarray(x)) for x in (cache.identity_logits(), cache.features()))
    inputs = HeadInputs(logits, features, torch.from_numpy(labels), np.arange(0))
    return Case(Path(data).name, logits, features, labels, self_influence(inputs))


def compare(case: Case, sharpness: list[float], fraction: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each start of the search; rewards are in ten-thousandths."""
    searches = []
    for tau in sharpness:
        method = build_learner(IF_BETA.complete_options("if-beta", {"preset": "paper", "tau": tau}), "balanced")
        searches.append(method.fit(case.logits, case.features, case.labels, fraction, scores=case.scores))
    pool, held_out = hold_out(case.labels, case.logits.shape[1])
    total = round(fraction * len(pool))
    sampler = StratifiedSampler.from_ranks(searches[0].u[pool], pool, case.labels[pool], total)
    data = ProxyData(Linear().transform(case.features, 0), torch.from_numpy(case.labels), case.logits)
    evaluator = PolicyEvaluator(Linear(), REWARDS["ce"], method.budget, data, held_out, 0)

    def rewards(policy: tuple[float, float], step: int, draws: int) -> np.ndarray:
        trials = [Trial(*policy, draw) for draw in range(draws)]
        return 1e4 * np.array([o.reward for o in evaluator.evaluate(trials, sampler=sampler, step=step)])

    best = GRID[int(np.argmax([rewards(policy, 999, GRID_DRAWS).mean() for policy in GRID]))]
    uniform, reached = (rewards(policy, 1234, FRESH_DRAWS) for policy in ((1.0, 1.0), best))
    for tau, found in zip(sharpness, searches, strict=True):
        mine = rewards(found.learned, 1234, FRESH_DRAWS)
        below = reached - mine
        yield {
            "data": case.name,
            "tau": tau,
            "a": found.learned[0],
            "b": found.learned[1],
            "gain": (mine - uniform).mean(),
            "best_gain": (reached - uniform).mean(),
            "below_best": below.mean(),
            "half_width": 2 * below.std(ddof=1) / FRESH_DRAWS**0.5,
        }


def main() -> None:
    """Search, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--cache")
    parser.add_argument("--tau", type=float, nargs="+", default=[4.0, 6.0, 8.0])
    parser.add_argument("--fraction", type=float, default=0.2)
    options = parser.parse_args()
    if options.data:
        topic, cases = "if_beta_sharpness_cache", iter([cached(options.data, options.cache)])
    else:
        topic, cases = "if_beta_sharpness", (planted(kind, seed) for kind in ("noise", "halves") for seed in range(3))
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows += compare(case, options.tau, options.fraction)
        write_results(topic, rows, fraction=options.fraction)
    print(table(rows))


if __name__ == "__main__":
    main()
