"""Cost of a training step with each term of the loss, relative to plain distillation from the same teacher.

    python bench/bench_terms.py [--student resnet20] [--teacher resnet32] [--samples 640] [--rounds 9]

Random images of 32 x 32 pixels, 100 classes, batches of 64; the teacher runs online, on the student's views. The steps
of all terms are interleaved; those of ab and fsp are of the phase in which they train alone, and the time of crd
depends on the number of samples. Prints a table and writes bench/results/terms.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import interleave, table, write_results

from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.distillation.batches import Batch
from kdfast.distillation.config import RunConfig
from kdfast.distillation.losses.registry import LOSSES
from kdfast.distillation.losses.settings import TermSetting
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model

CLASSES, BATCH = 100, 64


def make_inputs(teacher: str, samples: int, folder: Path) -> LoadedInputs:
    """Return random data and an untrained teacher."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (samples, 32, 32, 3), dtype=np.uint8), np.arange(samples) % CLASSES
    np.savez(folder / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    source = open_source(str(folder / "data.npz"))
    statistics = compute_normalization(source.train)
    model = Model(build_net(teacher, CLASSES), teacher, CLASSES, source.classes, statistics, {})
    return LoadedInputs(source, ResidentLoader(source.train), statistics, TeacherTargets(model=model))


def take_step(trainer: Trainer, batch: Batch) -> None:
    """Take one step, always with the same learning rate and in the same phase."""
    trainer.train_step(batch)
    trainer.step -= 1


def main() -> None:
    """Measure every term and print one table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--teacher", default="resnet32")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(options.teacher, options.samples, Path(folder))
    config = RunConfig(options.student, epochs=2, batch_size=BATCH, alpha=0.5, lr=1e-3, views=1)
    ids = np.arange(options.samples, dtype=np.int64)
    steps = {}
    for name in ("none", *LOSSES):
        terms = () if name == "none" else (TermSetting(name),)
        # A term that trains alone first costs nothing later, and one that is prepared first costs more then.
        initial = int(any(term.entry.initial for term in terms))
        settings = dataclasses.replace(config, terms=terms, initial_epochs=initial)
        trainer = Trainer(inputs.plan(settings, ids, device=device))
        batch = next(iter(trainer.batches.epoch(0, 0)))
        steps[name] = partial(take_step, trainer, batch)
    timings = interleave(steps, options.rounds, device=device.type)
    plain = timings["none"]
    rows = [
        {
            "term": name,
            "ms": round(1e3 * timing.median, 1),
            "to plain KD": round(timing.median / plain.median, 2),
            "range": f"{min(timing.seconds) / plain.median:.2f} to {max(timing.seconds) / plain.median:.2f}",
        }
        for name, timing in timings.items()
    ]
    print(table(rows))
    write_results(
        "terms", rows, student=options.student, teacher=options.teacher, samples=options.samples, batch_size=BATCH
    )


if __name__ == "__main__":
    main()
