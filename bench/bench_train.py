"""Cost of the teacher per training epoch: plain cross-entropy, cached KD and online KD, interleaved in one run.

    python bench/bench_train.py --data cifar-10-batches-py --teacher T.pt [--subset-size 1280] [--rounds 7]
                                [--device cuda]

Also compares the cached logits with those of the online teacher on the same views.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import interleave, table, write_results

from kdfast.data.readers.registry import open_source
from kdfast.data.subset import write_subset
from kdfast.distillation.config import RunConfig
from kdfast.distillation.inputs import InputPaths, plan_run
from kdfast.distillation.plan import Plan
from kdfast.distillation.trainer import Trainer
from kdfast.nets.checkpoint import load_model
from kdfast.teacher.build import build_cache

VIEWS = 4


def logits_difference(cached: Plan, online: Plan) -> tuple[float, float]:
    """Return the largest logit difference in an epoch, also in units of fp16 spacing at the row's largest logit."""
    worst = worst_units = 0.0
    for a, b in zip(cached.batches().epoch(0), online.batches().epoch(0), strict=True):
        if not torch.equal(a.ids, b.ids) or not torch.equal(a.view_ids, b.view_ids):
            raise SystemExit("cached and online runs see different samples or views")
        computed = online.targets.compute(b.images, b.image_rows, b.view_ids, b.ids).logits
        stored = a.teacher if a.teacher_rows is None else a.teacher[a.teacher_rows]
        difference = (stored.float() - computed).abs()
        spacing = 2.0 ** (computed.abs().amax(1, keepdim=True).log2().floor() - 10)
        worst = max(worst, float(difference.max()))
        worst_units = max(worst_units, float((difference / spacing).max()))
    return worst, worst_units


def main() -> None:
    """Measure and print one table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--subset-size", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    source, model = open_source(options.data), load_model(options.teacher)
    ids = np.arange(options.subset_size, dtype=np.int64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_subset(folder / "idx.npy", ids, {"data": source.fingerprint})
        build_cache(source, model, folder / "cache", ids=ids, n_views=VIEWS, device=options.device)
        config = RunConfig(options.student, epochs=1000, batch_size=64, views=VIEWS)
        teachers = {
            "plain cross-entropy": {},
            "cached KD": {"cache": str(folder / "cache")},
            "online KD": {"teacher": options.teacher},
        }
        plans = {
            row: plan_run(
                InputPaths(options.data, subset=str(folder / "idx.npy"), loader="resident", **teacher),
                config,
                alpha="0.5" if teacher else "0",
                device=torch.device(options.device),
            )
            for row, teacher in teachers.items()
        }
        worst, units = logits_difference(plans["cached KD"], plans["online KD"])
        trainers = {row: Trainer(plan) for row, plan in plans.items()}

        def epoch(trainer: Trainer) -> None:
            for batch in trainer.batches.epoch(trainer.epoch):
                trainer.train_step(batch)

        epochs = {row: partial(epoch, trainer) for row, trainer in trainers.items()}
        timed = interleave(epochs, options.rounds, device=options.device)
    rows = []
    for name, timing in timed.items():
        # Ratio to plain training, round by round.
        ratio, low, high = timed["plain cross-entropy"].ratio_to(timing)
        rows.append(
            {
                "epoch": name,
                "seconds": round(timing.median, 3),
                "images/s": round(len(ids) / timing.median),
                "x plain": f"{ratio:.3f}",
                "quartiles": f"{low:.3f} to {high:.3f}",
            }
        )
    print(f"epochs of {len(ids)} images, {options.student}, {options.rounds} rounds")
    print(table(rows))
    print(f"cached and online logits differ by at most {worst:.2g}, {units:.2f} units of fp16 spacing")
    topic = "train" if options.device == "cpu" else "train_cuda"
    write_results(topic, rows, largest_difference=worst, fp16_units=units, student=options.student, teacher=model.name)


if __name__ == "__main__":
    main()
