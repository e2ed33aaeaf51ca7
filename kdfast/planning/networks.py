"""Seconds of an image in each kind of work that runs a network, by the code that does the work."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import tempfile
import time
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path

import numpy as np
import torch

from kdfast.data.holdout import SplitPart
from kdfast.data.order import batch_count
from kdfast.data.views import Normalization
from kdfast.distillation.batches import Batch
from kdfast.distillation.config import Execution, RunConfig
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.record_dynamics import RecordingConfig, draw_training_mask, record_dynamics
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.estimates import row_builder
from kdfast.nets.checkpoint import Model
from kdfast.planning.sample import Sample
from kdfast.planning.timing import Enough, Stopwatch, mean_seconds, seconds_of
from kdfast.pruning.options import OptionValue
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.teacher.evaluate import evaluate_in_detail
from kdfast.teacher.flatten.config import FlattenConfig
from kdfast.teacher.flatten.flattener import Flattener
from kdfast.teacher.predictor import Precision, Predictor, default_batch_size
from kdfast.teacher.row_format import RowFormat

_PROBE = 8  # images of a first look at a network's speed
_CALLS = 4  # calls of a timing, at least about so many
_VIEWS = 5  # views of an image in a timing of a cache
_BLOCK_STEPS = 20  # steps between two waits for a GPU
_STEPS = 100_000  # of a run whose first steps are timed
# The seconds do not depend on the statistics, which would take a pass over the images.
PLAIN = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def time_cache(
    sample: Sample,
    model: Model,
    *,
    views: int,
    rows: RowFormat,
    precision: Precision,
    device: torch.device,
    budget: float,
) -> tuple[float, float]:
    """Return the seconds of a sample in a cache of one view, with reading its image, and those of each further view.

    What is written is not counted.
    """
    batch = default_batch_size(device)
    predictor = Predictor(model, sample.source.view_spec, device, batch)
    most, several = min(batch, len(sample.ids)), min(_VIEWS, views)

    def seconds(count: int, n_views: int) -> float:
        builder = row_builder(sample.source, predictor, n_views, rows, precision)
        return seconds_of(lambda: builder.compute(sample.ids[:count], lambda _: None))

    few = min(_PROBE, most)
    seconds(few, 1)
    count = _fitting(seconds(few, 1) / few * several, budget, most)
    one = mean_seconds(lambda: seconds(count, 1), budget / 3)
    if several == 1:
        return one / count, 0.0
    all_views = mean_seconds(lambda: seconds(count, several), budget * 2 / 3)
    return one / count, max(0.0, all_views - one) / (several - 1) / count


def time_step(
    sample: Sample,
    config: RunConfig,
    teacher: TeacherTargets,
    *,
    device: torch.device,
    execution: Execution,
    budget: float,
    initial: bool = False,
) -> float:
    """Return the seconds of a training step for each of its images, with loading them and the teacher's logits.

    Args:
        sample: The images.
        config: The settings of the run.
        teacher: Where the teacher's logits come from.
        device: Where to train.
        execution: How the steps are computed.
        budget: Seconds of the timing.
        initial: Whether to time the steps in which some terms train alone.
    """
    epochs = max(2, _STEPS * config.batch_size // len(sample.ids))
    phase = epochs - 1 if initial else 0 if config.terms else None
    config = dataclasses.replace(config, epochs=epochs, steps=None, initial_epochs=phase)
    inputs = LoadedInputs(sample.source, sample.open_loader(device), PLAIN, teacher)
    trainer = Trainer(inputs.plan(config, sample.ids, device=device, execution=execution))
    batches = _endless(trainer)
    steps = 1 if device.type == "cpu" else _BLOCK_STEPS

    def measure() -> float:
        images, started = 0, time.perf_counter()
        for batch in itertools.islice(batches, steps):
            trainer.train_step(batch)
            images += len(batch.ids)
        trainer.wait()
        _synchronize(device)
        return (time.perf_counter() - started) / images

    try:
        with trainer.stream():
            return mean_seconds(measure, budget)
    finally:
        batches.close()
        trainer.close()
        inputs.loader.close()


def time_evaluation(sample: Sample, model: Model, *, device: torch.device, budget: float) -> float:
    """Return the seconds of an image of the test split in the evaluation at the end of a stage."""
    test, batch = sample.source.test, default_batch_size(device)

    def seconds(count: int) -> float:
        part = SplitPart(test, np.arange(count, dtype=np.int64))
        spec = sample.source.view_spec
        return seconds_of(lambda: evaluate_in_detail(model, part, device=device, view_spec=spec))

    few = min(_PROBE, len(test))
    seconds(few)
    count = _fitting(seconds(few) / few, budget, len(test))
    count = max(count // batch, 1) * batch if count > batch else count
    return mean_seconds(lambda: seconds(count), budget) / count


def time_recording(
    sample: Sample, config: RunConfig, recording: RecordingConfig, *, device: torch.device, budget: float
) -> float:
    """Return the seconds of an epoch of recorded training for each sample, on all of the sample's images."""
    recording = dataclasses.replace(recording, runs=1, only=None)
    trained = int(draw_training_mask(len(sample.ids), recording.keep, config.seed, 0).sum())
    per_epoch = batch_count(trained, config.batch_size)
    watch = Stopwatch(budget)

    def at_epoch_end(done: int, total: int, note: str) -> None:
        if done % per_epoch == 0:
            watch(done // per_epoch, total // per_epoch, note)

    inputs = LoadedInputs(sample.source, sample.open_loader(device), PLAIN, TeacherTargets())
    config = dataclasses.replace(config, epochs=max(3, _STEPS // per_epoch))
    with tempfile.TemporaryDirectory(prefix="kdfast-") as folder, contextlib.suppress(Enough):
        record_dynamics(inputs, config, recording, Path(folder) / "dynamics", device=device, progress=at_epoch_end)
    assert watch.seconds_per_unit is not None, "three epochs end"
    return watch.seconds_per_unit / len(sample.ids)


def time_flattening(
    sample: Sample, model: Model, config: FlattenConfig, *, device: torch.device, budget: float
) -> float:
    """Return the seconds of a step of flattening the teacher."""
    ids = sample.ids[: _CALLS * config.batch_size]
    net = copy.deepcopy(model.net).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    part = SplitPart(sample.source.train, ids)
    flattener = Flattener(dataclasses.replace(model, net=net), part, ids, sample.source.view_spec, config)

    def step() -> None:
        flattener.take_step()
        _synchronize(device)

    return mean_seconds(lambda: seconds_of(step), budget)


def time_network_score(
    sample: Sample, model: Model, method: str, options: Mapping[str, OptionValue], *, device: str, budget: float
) -> tuple[float, float]:
    """Return the seconds of a sample in a score that differentiates the network.

    Returns:
        Seconds of a sample of the Fisher, 0 for a score without one; and of a sample that is scored.
    """

    def seconds(count: int) -> tuple[float, float]:
        marks: dict[str, list[tuple[float, int]]] = {"": [(time.perf_counter(), 0)]}

        def mark(done: int, _total: int, note: str) -> None:
            marks.setdefault(note, []).append((time.perf_counter(), done))

        part = SplitPart(sample.source.train, sample.ids[:count])
        sources = ScoreSources(dataclasses.replace(sample.source, train=part), network=model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sources.score(method, seed=0, options=options, device=device, progress=mark)
        if len(marks) < 3:  # a score without a Fisher does not report
            return 0.0, found.seconds / count
        phases = list(marks.values())
        fisher, scored = (_span(before[-1], reports) for before, reports in itertools.pairwise(phases))
        return fisher, scored

    count = min(_SCORED[torch.device(device).type], len(sample.ids))
    took = seconds_of(lambda: seconds(count))
    fitting = min(int(count * budget / took), len(sample.ids)) // count * count
    return seconds(max(count, fitting))


_SCORED = {"cpu": 256, "cuda": 4096}  # samples of a first look at a score: several of its batches


def _span(start: tuple[float, int], reports: list[tuple[float, int]]) -> float:
    """Return the seconds of a sample from the first report of a phase to its last, or from its start if it has one."""
    (first, before), (last, after) = reports[0] if len(reports) > 1 else start, reports[-1]
    return (last - first) / (after - before)


def _endless(trainer: Trainer) -> Generator[Batch, None, None]:
    for epoch in itertools.count():
        yield from trainer.batches.epoch(epoch)


def _fitting(seconds: float, budget: float, most: int) -> int:
    """Return how many images, of so many seconds each, fit into a call of a timing, at most `most`."""
    return max(1, min(most, int(budget / _CALLS / max(seconds, 1e-9))))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
