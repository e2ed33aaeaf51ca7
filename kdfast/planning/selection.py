"""Seconds of a selection, by selecting from random logits, features and dynamics of the shapes of the real ones."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np

from kdfast.data.readers.bare_labels import from_labels
from kdfast.data.stateless_random import IntArray
from kdfast.distillation.record_dynamics import RecordingConfig, draw_training_mask
from kdfast.dynamics.recorder import DynamicsRecorder
from kdfast.planning.request import differentiates
from kdfast.planning.timing import Enough, Stopwatch
from kdfast.pruning.request import PruneRequest
from kdfast.pruning.score_file import ScoreFile
from kdfast.teacher.writing.outputs import teacher_outputs

_FEW = 4000  # samples of a first look
_NUMBERS = 1 << 26  # of logits and features, in all
_RUNS = 10  # of dynamics; more take as long each
_MARGIN = 4.0  # of the label's logit


def time_selection(
    request: PruneRequest,
    labels: IntArray,
    *,
    classes: int,
    features: int,
    epochs: int,
    recording: RecordingConfig,
    budget: float,
) -> float:
    """Return the seconds in which a request selects, with the score that it computes from logits or dynamics.

    The work on a part of the samples is timed first, and that on all of them if it fits; else it grows with their
    number.

    Args:
        request: The selection at one fraction, with the folders of cache and dynamics that it needs, which are not
            read. If it ranks by a network's score, that score is not part of it.
        labels: int64 (N,), classes of the training split.
        classes: C.
        features: Width of the teacher's features, or of the recorded network's.
        epochs: Epochs of each run of the dynamics.
        recording: How the dynamics are recorded.
        budget: Seconds of the timing.
    """
    total = len(labels)
    runs = min(recording.runs, _RUNS)
    width = (classes + features) * (epochs * runs if request.dynamics is not None else 1)
    most = min(total, max(1, _NUMBERS // width))
    # A fraction of few samples may leave a class empty.
    count = min(total, max(_FEW, round(4 * classes / request.fractions[0])))

    def seconds(count: int, budget: float) -> float:
        part = labels if count == total else np.arange(count, dtype=np.int64) % classes
        return _select(request, part, classes, features, epochs, dataclasses.replace(recording, runs=runs), budget)

    found = seconds(count, budget / 2)
    grown = min(most, int(count * budget / max(found, 1e-9)))
    if grown >= 2 * count or count < grown == total:
        count, found = grown, seconds(grown, budget)
    return found * total / count * (recording.runs / runs if request.dynamics is not None else 1)


def _select(
    request: PruneRequest,
    labels: IntArray,
    classes: int,
    features: int,
    epochs: int,
    recording: RecordingConfig,
    budget: float,
) -> float:
    """Return the seconds of a selection; those of a search that takes longer are estimated from its first steps."""
    draw = np.random.default_rng(0)
    source = from_labels(labels, tuple(map(str, range(classes))))
    with tempfile.TemporaryDirectory(prefix="kdfast-") as name:
        folder = Path(name)
        here = dataclasses.replace(request, teacher=None)
        if request.cache is not None:
            logits, values = _outputs(draw, labels, classes, features)
            cache = teacher_outputs(logits, source, folder / "cache", features=values)
            here = dataclasses.replace(here, cache=cache.path)
        if request.dynamics is not None:
            here = dataclasses.replace(here, dynamics=folder / "dynamics")
            _record(folder / "dynamics", draw, labels, classes, features, epochs, recording, source.fingerprint)
        if (score := differentiates(request)) is not None:
            scores = ScoreFile(draw.random(len(labels)), score, source.fingerprint)
            method = request.method if request.uses_selector else None
            here = dataclasses.replace(here, method=method, scores=scores, score_options={})
        watch, started = Stopwatch(budget), time.perf_counter()
        try:
            (selection,) = here.run(source, progress=watch)
        except Enough:
            assert watch.seconds_per_unit is not None
            return watch.total * watch.seconds_per_unit
        return selection.seconds or time.perf_counter() - started


def _outputs(draw: np.random.Generator, labels: IntArray, classes: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random logits (N, C), larger for the labels, and features (N, D)."""
    logits = draw.standard_normal((len(labels), classes), np.float32)
    logits[np.arange(len(labels)), labels] += _MARGIN
    return logits, draw.standard_normal((len(labels), features), np.float32)


def _record(
    folder: Path,
    draw: np.random.Generator,
    labels: IntArray,
    classes: int,
    features: int,
    epochs: int,
    recording: RecordingConfig,
    fingerprint: str,
) -> None:
    """Record dynamics of random outputs."""
    everything = np.arange(len(labels))
    for run in range(recording.runs):
        with DynamicsRecorder(
            folder,
            len(labels),
            labels,
            epochs=epochs,
            run=run,
            runs=recording.runs,
            mask=draw_training_mask(len(labels), recording.keep, 0, run),
            feature_epochs=[epochs - 1],
            top_k=recording.top_k,
            classes=classes,
            fingerprint=fingerprint,
            record=recording.record,
        ) as recorder:
            for _ in range(epochs):
                logits, values = _outputs(draw, labels, classes, features)
                recorder.update(everything, logits, values)
                if recording.record == "batch":
                    recorder.update_batch(everything, logits)
                recorder.end_epoch()
