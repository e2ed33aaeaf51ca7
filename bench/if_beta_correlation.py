"""Does the proxies' reward tell what a real student makes of a subset? Rank correlation over subsets of many policies.

    python bench/if_beta_correlation.py --data cifar-10-batches-py --cache cache --out rows.jsonl [--fraction 0.1]

Draws a subset for each (a, b) of a fixed list that holds extreme ones, trains one student on each (all with the same
number of steps), trains proxies on other draws of the same policies, and compares. Rows are appended as students are
finished; the same command goes on. `--students 0` only compares what is in the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import write_results
from scipy.stats import spearmanr

from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source
from kdfast.data.subset import write_subset
from kdfast.device import resolve_device
from kdfast.distill.folder import RunFolder
from kdfast.distill.plan import Inputs, prepare
from kdfast.distill.train import train
from kdfast.prune.if_beta.evaluator import Arena
from kdfast.prune.if_beta.gradient import Trial
from kdfast.prune.if_beta.holdout import hold_out
from kdfast.prune.if_beta.inner import Budget, Lesson
from kdfast.prune.if_beta.policy import Design, average_ranks
from kdfast.prune.if_beta.proxy import PROXIES
from kdfast.prune.if_beta.reward import REWARDS
from kdfast.prune.if_beta.scores import SAMPLE_SCORES, Signals, mean_logits
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


def students(source: Source, design: Design, options: argparse.Namespace, out: Path) -> list[dict[str, float]]:
    """The rows there are, and as many new ones as asked for."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["a"], row["b"], row["seed"]) for row in rows}
    wanted = [(a, b, options.seed) for a, b in POLICIES if (a, b, options.seed) not in done]
    settings = {
        "student": options.student,
        "epochs": options.epochs,
        "lr": 0.1,
        "schedule": "cosine",
        "precision": "bf16",
        "views": options.views,
        "view_seed": 0,
        "seed": options.seed,
    }
    for a, b, seed in wanted[: options.students]:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "idx.npy"
            ids = np.sort(design.draw(a, b, design.gumbel(seed, 1 << 20, 0)))
            write_subset(path, ids, {"data": source.fingerprint})
            inputs = Inputs(options.data, subset=str(path), cache=options.cache)
            plan = prepare(inputs, settings, alpha="auto", device=resolve_device("cpu"))
            with RunFolder(Path(name) / "run", plan.identity) as folder:
                result = train(plan, folder)
        rows.append({"a": a, "b": b, "seed": seed, "test_top1": result["test_top1"]})
        with out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Train what is missing, compare, write the JSON."""
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
    options = parser.parse_args()
    source = open_source(options.data)
    labels, cache = source.train.labels, TeacherCache.open(options.cache, source=source)
    ids = np.arange(len(labels), dtype=np.int64)
    h, z = (torch.tensor(np.asarray(x)) for x in (cache.features(), cache.identity_logits()))
    seen = mean_logits(cache.lookup(ids, np.full_like(ids, view)) for view in range(cache.n_views))
    pool, held = hold_out(labels, z.shape[1], seed=options.seed)
    y = torch.from_numpy(labels)
    u = average_ranks(SAMPLE_SCORES[options.score](Signals(seen, h, y, held)), labels)
    whole = Design.of(u, ids, labels, round(options.fraction * len(ids)))
    within = Design.of(u[pool], pool, labels[pool], round(options.fraction * len(pool)))
    rows = students(source, whole, options, options.out)
    proxy = PROXIES["projection"]()
    lesson = Lesson(proxy.inputs(h, options.seed), y, z)
    evaluate = Arena(proxy, REWARDS["kd"], Budget(), lesson, held, options.seed).evaluator(within, 0)
    found = []
    for a, b in sorted({(row["a"], row["b"]) for row in rows}):
        real = [row["test_top1"] for row in rows if (row["a"], row["b"]) == (a, b)]
        reward = float(np.mean([o.reward for o in evaluate([Trial(a, b, k) for k in range(REPEATS)])]))
        found.append({"a": a, "b": b, "students": len(real), "test_top1": float(np.mean(real)), "reward": reward})
        print(f"a {a:g} b {b:g}: reward {reward:.4f}, test top-1 {np.mean(real):.2f} (n = {len(real)})")
    agreement = spearmanr([row["reward"] for row in found], [row["test_top1"] for row in found])
    print(f"Spearman {agreement.statistic:+.2f} over {len(found)} policies (p = {agreement.pvalue:.3f})")
    numbers = {"spearman": float(agreement.statistic), "p": float(agreement.pvalue)}
    write_results("if_beta_correlation", found, data=Path(options.data).name, fraction=options.fraction, **numbers)


if __name__ == "__main__":
    main()
