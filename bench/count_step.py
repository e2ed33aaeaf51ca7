"""Count what a training step asks of a GPU, without a GPU: the operators that compute something.

    python bench/count_step.py [--student resnet32] [--batch-size 128] [--precision bf16]

A step runs on the CPU as it would on a GPU: all data resident, cached logits indexed in place, one fused update. Most
operators are one launch there; the backward pass of a convolution is at least two. Replayed as a CUDA graph, a step is
one launch, and one more that copies the batch's index.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import table, write_results
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.distillation import targets
from kdfast.distillation.config import RunConfig
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.recipe import optimizer
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache

CPU = torch.device("cpu")


class OperatorCounts(TorchDispatchMode):
    """Counts the operators that compute, without those that only make another tensor of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and "empty" not in str(func) and func.namespace != "profiler":
            self.counts[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def make_trainer(options: argparse.Namespace, folder: Path) -> Trainer:
    """Return a trainer on the digits that keeps everything in memory, as on a GPU."""
    source = open_source("digits")
    ids = np.arange(2 * options.batch_size, dtype=np.int64)
    normalization = compute_normalization(source.train)
    teacher = Model(build_net("resnet8", 10).eval(), "resnet8", 10, source.classes, normalization, {})
    build_cache(source, teacher, folder / "cache", ids=ids, n_views=2)
    cached = TeacherTargets(cache=TeacherCache.open(folder / "cache"))
    inputs = LoadedInputs(source, ResidentLoader(source.train), normalization, cached)
    config = RunConfig(options.student, batch_size=options.batch_size, alpha=0.9, precision=options.precision)
    plan = inputs.plan(config, ids, device=CPU)
    plan.targets = targets.CachedTargets(cached.cache, ids, plan.config.views, 0, CPU, resident=True)
    optimizer.runs_on_device = lambda device: True
    return Trainer(plan)


def main() -> None:
    """Count and print one table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        trainer = make_trainer(options, Path(name))
        batches = trainer.batches.epoch(0)
        trainer.train_step(next(batches))
        with OperatorCounts() as mode:
            trainer.train_step(next(batches))
    rows = [{"operator": name, "calls": count} for name, count in mode.counts.most_common()]
    total = sum(mode.counts.values())
    print(table(rows))
    print(f"{total} operators in a step of {options.student}, batch {options.batch_size}, {options.precision}")
    settings = {"student": options.student, "batch_size": options.batch_size, "precision": options.precision}
    write_results("step_operators", rows, total=total, **settings)


if __name__ == "__main__":
    main()
