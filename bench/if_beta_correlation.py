"""Rank correlation between the proxies' reward and the accuracy of real students, over subsets of many policies.

    python bench/if_beta_correlation.py --data cifar-10-batches-py --cache cache --out rows.jsonl [--fraction 0.1]

For each (a, b) of a fixed list, which includes extreme policies, the script draws a subset, trains one student on it
(all with the same number of steps), trains proxies on other draws of the same policy, and compares. A row is appended
after each student; run the same command again to continue. `--students 0` only compares the rows in the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import read_rows, write_results
from scipy.stats import spearmanr

from kdfast.data.holdout import hold_out
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source
from kdfast.data.subset import write_subset
from kdfast.device import resolve_device
from kdfast.distillation.config import RunConfig
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.inputs import InputPaths, plan_run
from kdfast.distillation.train import train
from kdfast.pruning.if_beta.estimators import Trial
from kdfast.pruning.if_beta.evaluator import PolicyEvaluator
from kdfast.pruning.if_beta.policy import StratifiedSampler, average_ranks
from kdfast.pruning.if_beta.proxy import PROXIES, ProxyData
from kdfast.pruning.if_beta.reward import REWARDS
from kdfast.pruning.if_beta.scores import SAMPLE_SCORES, HeadInputs, mean_logits
from kdfast.pruning.if_beta.selector.presets import OPTIONS, build_learner
from kdfast.pruning.if_beta.selector.select import IF_BETA
from kdfast.teacher.cache import TeacherCache

POLICIES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 4),
    (4, 1),
    (2, 2),
    (0.5, 0.5),
    (2, 4),
    (4, 4),
    (1, 8),
    (8, 1),
    (1, 1.5),
    (3, 5),
]
REPEATS = 8
# Step number of the students' draws, beyond those of the proxies.
STUDENT_STEP = 1 << 20


def train_students(source: Source, sampler: StratifiedSampler, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the file after training up to `--students` more students."""
    out: Path = options.out
    rows = read_rows(out)
    done = {(row["a"], row["b"], row["seed"]) for row in rows}
    missing = [(a, b) for a, b in POLICIES if (a, b, options.seed) not in done]
    for a, b in missing[: options.students]:
        ids = np.sort(sampler.draw(a, b, sampler.gumbel(options.seed, STUDENT_STEP, 0)))
        rows.append({"a": a, "b": b, "seed": options.seed, "test_top1": train_student(source, ids, options)})
        with out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)
    return rows


def train_student(source: Source, ids: np.ndarray, options: argparse.Namespace) -> float:
    """Distill one student on a subset and return its test accuracy."""
    config = RunConfig(
        student=options.student,
        epochs=options.epochs,
        lr=0.1,
        schedule="cosine",
        precision="bf16",
        views=options.views,
        view_seed=0,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "idx.npy"
        write_subset(path, ids, {"data": source.fingerprint})
        paths = InputPaths(options.data, subset=str(path), cache=options.cache)
        plan = plan_run(paths, config, alpha="auto", device=resolve_device("cpu"))
        with RunFolder(Path(name) / "run", plan.identity) as folder:
            return float(train(plan, folder)["test_top1"])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--students", type=int, default=len(POLICIES))
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--views", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", default="residual", choices=SAMPLE_SCORES)
    parser.add_argument("--preset", default="kdfast", choices=OPTIONS, help="whose proxies and reward")
    return parser.parse_args()


def main() -> None:
    """Train the missing students, compare, and write the JSON."""
    options = parse_arguments()
    source = open_source(options.data)
    labels, cache = source.train.labels, TeacherCache.open(options.cache, source=source)
    ids = np.arange(len(labels), dtype=np.int64)
    features, logits = (torch.tensor(np.asarray(x)) for x in (cache.features(), cache.identity_logits()))
    score_logits = mean_logits(cache.lookup(ids, np.full_like(ids, view)) for view in range(cache.n_views))
    pool, held_out = hold_out(labels, logits.shape[1], seed=options.seed)
    y = torch.from_numpy(labels)
    u = average_ranks(SAMPLE_SCORES[options.score](HeadInputs(score_logits, features, y, held_out)), labels)
    sampler = StratifiedSampler.from_ranks(u, ids, labels, round(options.fraction * len(ids)))
    pool_sampler = StratifiedSampler.from_ranks(u[pool], pool, labels[pool], round(options.fraction * len(pool)))
    rows = train_students(source, sampler, options)

    method = build_learner(IF_BETA.complete_options("if-beta", {"preset": options.preset}), "balanced")
    proxy = PROXIES[method.proxy]() if isinstance(method.proxy, str) else method.proxy
    data = ProxyData(proxy.transform(features, options.seed), y, logits)
    evaluator = PolicyEvaluator(proxy, REWARDS[method.reward], method.budget, data, held_out, options.seed)
    found = []
    for a, b in sorted({(row["a"], row["b"]) for row in rows}):
        top1 = [row["test_top1"] for row in rows if (row["a"], row["b"]) == (a, b)]
        outcomes = evaluator.evaluate([Trial(a, b, k) for k in range(REPEATS)], sampler=pool_sampler, step=0)
        reward = float(np.mean([outcome.reward for outcome in outcomes]))
        found.append({"a": a, "b": b, "students": len(top1), "test_top1": float(np.mean(top1)), "reward": reward})
        print(f"a {a:g} b {b:g}: reward {reward:.4f}, test top-1 {np.mean(top1):.2f} (n = {len(top1)})")
    correlation = spearmanr([row["reward"] for row in found], [row["test_top1"] for row in found])
    print(f"Spearman {correlation.statistic:+.2f} over {len(found)} policies (p = {correlation.pvalue:.3f})")
    numbers = {"spearman": float(correlation.statistic), "p": float(correlation.pvalue)}
    topic = "if_beta_correlation" if options.preset == "kdfast" else f"if_beta_correlation_{options.preset}"
    write_results(topic, found, data=Path(options.data).name, fraction=options.fraction, **numbers)


if __name__ == "__main__":
    main()
