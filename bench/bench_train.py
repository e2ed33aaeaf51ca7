"""What the teacher costs a training epoch: plain cross-entropy, cached KD and online KD, interleaved in one run.

    python bench/bench_train.py --data cifar-10-batches-py --teacher T.pt [--subset-size 2560] [--rounds 7]

Also compares the logits that the student sees from the cache with those of the online teacher on the same views.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import interleave, machine, save

from kdfast.data.sources import open_source
from kdfast.data.subset import write_subset
from kdfast.distill.plan import Inputs, Plan, prepare
from kdfast.distill.trainer import Trainer
from kdfast.nets.checkpoint import load_model
from kdfast.teacher.build import build_cache

VIEWS = 4


def logits_difference(cached: Plan, online: Plan) -> tuple[float, float]:
    """Largest difference between cached and online logits over an epoch, and in units of fp16 rounding."""
    worst = worst_units = 0.0
    for a, b in zip(cached.batches().epoch(0), online.batches().epoch(0), strict=True):
        if not torch.equal(a.ids, b.ids) or not torch.equal(a.view_ids, b.view_ids):
            raise SystemExit("cached and online runs see different samples or views")
        difference = (a.teacher.float() - b.teacher.float()).abs()
        spacing = 2.0 ** (b.teacher.abs().float().clamp_min(2.0**-14).log2().floor() - 10)
        worst = max(worst, float(difference.max()))
        worst_units = max(worst_units, float((difference / spacing).max()))
    return worst, worst_units


def main() -> None:
    """Measure and print one table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--subset-size", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    source, model = open_source(options.data), load_model(options.teacher)
    ids = np.arange(options.subset_size, dtype=np.int64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_subset(folder / "idx.npy", ids, {"data": source.fingerprint})
        started = time.perf_counter()
        build_cache(source, model, folder / "cache", ids=ids, n_views=VIEWS)
        caching = time.perf_counter() - started
        settings = {"student": options.student, "epochs": 1000, "batch_size": 64, "views": VIEWS}
        files = {
            "plain cross-entropy": {},
            "cached KD": {"cache": str(folder / "cache")},
            "online KD": {"teacher": options.teacher},
        }
        plans = {
            row: prepare(
                Inputs(options.data, subset=str(folder / "idx.npy"), loader="resident", **extra),
                settings,
                alpha="0.5" if extra else "0",
                device=torch.device("cpu"),
            )
            for row, extra in files.items()
        }
        worst, units = logits_difference(plans["cached KD"], plans["online KD"])
        trainers = {row: Trainer(plan) for row, plan in plans.items()}

        def epoch(trainer: Trainer) -> None:
            for batch in trainer.batches.epoch(trainer.epoch):
                trainer.train_step(batch)

        timed = interleave({row: lambda t=t: epoch(t) for row, t in trainers.items()}, rounds=options.rounds)
        plain = timed["plain cross-entropy"]
        print(f"cached against online logits: at most {worst:.2g} apart, {units:.2f} units of fp16 spacing")
        print(f"{'epoch of ' + str(len(ids)):<22} {'median s':>9} {'images/s':>9} {'x plain':>8}")
        rows = {}
        for row, times in timed.items():
            ratio = float(np.median(np.array(times) / np.array(plain)))
            seconds = float(np.median(times))
            rows[row] = {"seconds": list(times), "images_per_second": len(ids) / seconds, "ratio_to_plain": ratio}
            print(f"{row:<22} {seconds:>9.3f} {len(ids) / seconds:>9.0f} {ratio:>8.3f}")
        saved = len(ids) * VIEWS / caching
        print(f"caching ran the teacher on {saved:.0f} images/s, once")
        save("train", {"machine": machine(), "rows": rows, "logits_difference": worst, "fp16_units": units})


if __name__ == "__main__":
    main()
