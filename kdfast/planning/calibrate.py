"""Measure the rates of this machine that a plan needs, each for its share of the time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kdfast.data.holdout import SplitPart
from kdfast.data.readers.folders.file_loader import is_files
from kdfast.data.source import SUMS_KEY, ArraySplit, Source, channel_sums, digest_split, fingerprint_key
from kdfast.distillation.targets import TeacherTargets
from kdfast.errors import OutputError
from kdfast.files.remembered import is_remembered
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.nets.head import forward_with_features
from kdfast.nets.initial import build_started_net
from kdfast.planning.networks import (
    PLAIN,
    time_cache,
    time_evaluation,
    time_flattening,
    time_network_score,
    time_recording,
    time_step,
)
from kdfast.planning.rates import Rates
from kdfast.planning.request import Amounts, PlanRequest, differentiates, flattening_of
from kdfast.planning.sample import Sample, cache_stand_in
from kdfast.planning.selection import time_selection
from kdfast.planning.timing import seconds_of
from kdfast.pruning.options import complete_options
from kdfast.pruning.scores.registry import get_score
from kdfast.teacher.row_format import RowFormat

_BATCHES = 8  # of images that must be decoded
_RECORDED_BATCHES = {"cpu": 8, "cuda": 64}  # of an epoch of recorded training
_WRITTEN_BYTES = 16 << 20
# Shares of the time, in proportion: what takes longest in most plans is measured longest.
_SHARES = {
    "trained": 4.0,
    "initial": 2.0,
    "cached": 3.0,
    "recorded": 4.0,
    "scored": 3.0,
    "flattened": 2.0,
    "selection": 1.0,
    "tested": 0.5,
    "teacher_tested": 0.5,
}


@dataclass(frozen=True)
class Calibration:
    """What a plan is measured on.

    Attributes:
        request: The plan, with its selection complete.
        source: The data, augmented as the run shall.
        model: The teacher, or None.
        amounts: The work.
        rows: The format of the cache; None without a teacher.
    """

    request: PlanRequest
    source: Source
    model: Model | None
    amounts: Amounts
    rows: RowFormat | None

    def measure(self, opening: float) -> Rates:
        """Return the rates; `opening` is the seconds of opening the data, known already.

        Raises:
            KdfastError: A stage would fail in the same way.
        """
        amounts = self.amounts
        needed = {
            "trained": True,
            "initial": amounts.initial > 0,
            "cached": bool(amounts.views or amounts.scored_views),
            "recorded": amounts.recorded_epochs > 0,
            "scored": amounts.scores_network,
            "flattened": amounts.flattening > 0,
            "selection": True,
            "tested": True,
            "teacher_tested": self.model is not None,
        }
        total = sum(_SHARES[name] for name, is_needed in needed.items() if is_needed)
        budgets = {name: self.request.seconds * _SHARES[name] / total for name in needed if needed[name]}
        found = {
            **self._teacher(budgets),
            **self._student(budgets),
            **self._selection(budgets),
            "opening": opening,
            **self._first_reading(),
            "loading": self._loading(),
            "written": _time_writing(self.request.out),
        }
        return Rates(**found)

    @cached_property
    def sample(self) -> Sample:
        """The images to measure on."""
        request = self.request
        batches = _BATCHES * request.config.batch_size
        return Sample.take(self.source, request.loader, request.device, kept=self.amounts.kept, decoded=batches)

    @cached_property
    def features(self) -> int:
        """Width of the features that a selection reads: the teacher's, or without one the recorded network's."""
        net = self.model.net if self.model is not None else None
        if net is None:
            config = self.request.recorded or self.request.config
            with torch.random.fork_rng(devices=[]):
                net = build_net(config.student, len(self.source.classes)).eval()
        with torch.no_grad():
            return forward_with_features(net, torch.zeros(1, 3, *self.source.view_spec.size))[1].shape[1]

    @cached_property
    def running(self) -> Model | None:
        """A copy of the teacher, which moves to the device."""
        return None if self.model is None else dataclasses.replace(self.model, net=copy.deepcopy(self.model.net))

    def _teacher(self, budgets: dict[str, float]) -> dict[str, float]:
        request, model = self.request, self.running
        found: dict[str, float] = {}
        if model is None:
            return found
        if "cached" in budgets and self.rows is not None:
            found["cached"], found["view"] = time_cache(
                self.sample,
                model,
                views=max(self.amounts.views, 1),
                rows=self.rows,
                precision=request.cache.precision,
                device=request.device,
                budget=budgets["cached"],
            )
        found["teacher_tested"] = time_evaluation(
            self.sample, model, device=request.device, budget=budgets["teacher_tested"]
        )
        flattening = flattening_of(request.selection, model)
        if flattening is not None:
            found["flattened"] = time_flattening(
                self.sample, model, flattening, device=request.device, budget=budgets["flattened"]
            )
        return found

    def _student(self, budgets: dict[str, float]) -> dict[str, float]:
        request = self.request
        found: dict[str, float] = {}
        with tempfile.TemporaryDirectory(prefix="kdfast-") as folder:
            teacher, views = self._targets(Path(folder))
            config = dataclasses.replace(request.config, views=views)
            for name in ("trained", "initial"):
                if name in budgets:
                    with _threads_of(request.jobs):
                        found[name] = time_step(
                            self.sample,
                            config,
                            teacher,
                            device=request.device,
                            execution=request.execution,
                            budget=budgets[name],
                            initial=name == "initial",
                        )
        classes = len(self.source.classes)
        with torch.random.fork_rng(devices=[]):
            net = build_started_net(request.config.student, classes, request.config.init)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        student = Model(net, request.config.student, classes, self.source.classes, PLAIN)
        found["tested"] = time_evaluation(self.sample, student, device=request.device, budget=budgets["tested"])
        if "recorded" in budgets and request.recorded is not None:
            batches = _RECORDED_BATCHES[request.device.type] * request.recorded.batch_size
            part = Sample.take(
                self.source, "resident", request.device, kept=min(batches, self.amounts.samples), decoded=batches
            )
            if self.sample.loader == "files":  # each epoch decodes the images
                part = dataclasses.replace(part, loader="files")
            found["recorded"] = time_recording(
                part, request.recorded, request.recording, device=request.device, budget=budgets["recorded"]
            )
        return found

    def _targets(self, folder: Path) -> tuple[TeacherTargets, int]:
        """Return where the teacher's logits come from in the timing of steps, and the views of the run."""
        request, model, views = self.request, self.running, self.request.config.views
        if model is None or not request.config.needs_teacher:
            return TeacherTargets(), views
        if request.online:
            return TeacherTargets(model=model), views
        views = min(2, self.amounts.views)
        cache = cache_stand_in(
            self.sample,
            model,
            folder / "cache",
            features=self.features,
            views=views,
            dtype=request.cache.dtype,
            top_k=request.cache.top_k,
            kind=request.cache.kind,
        )
        return TeacherTargets(cache=cache), views

    def _selection(self, budgets: dict[str, float]) -> dict[str, float]:
        request = self.request
        found: dict[str, float] = {}
        score = differentiates(request.selection)
        if score is not None and self.running is not None:
            options = {**request.selection.score_options, **({"fisher": "train"} if self.amounts.fisher else {})}
            found["fisher"], found["scored"] = time_network_score(
                self.sample,
                self.running,
                score,
                complete_options(score, get_score(score).options, options),
                device=str(request.device),
                budget=budgets["scored"],
            )
        found["selection"] = time_selection(
            request.selection,
            self.source.train.labels,
            classes=len(self.source.classes),
            features=self.features if request.selection.cache or request.selection.dynamics else 1,
            epochs=1 if request.recorded is None else request.recorded.epochs,
            recording=request.recording,
            budget=budgets["selection"],
        )
        return found

    def _first_reading(self) -> dict[str, float]:
        """Return the seconds of an image file in the passes that find what is remembered later."""
        source, found = self.source, {}
        if not is_files(source.train):
            return {}
        classes = len(source.classes)
        count = min(len(source.train), _BATCHES * self.request.config.batch_size)
        chosen = np.linspace(0, len(source.train) - 1, count).astype(np.int64)
        part = SplitPart(source.train, chosen)
        if source.recorded is None and not is_remembered(source.train, fingerprint_key(classes)):
            found["digested"] = seconds_of(lambda: digest_split(part, classes)) / len(chosen)
        if not is_remembered(source.train, SUMS_KEY):
            found["summed"] = seconds_of(lambda: channel_sums(part)) / len(chosen)
        return found

    def _loading(self) -> float:
        """Return the seconds of an image that is decoded before a training; 0 if it is in memory or read in steps."""
        if self.sample.loader != "resident" or isinstance(self.source.train, ArraySplit):
            return 0.0
        return seconds_of(lambda: self.sample.open_loader(self.request.device).close()) / len(self.sample.ids)


@contextlib.contextmanager
def _threads_of(jobs: int) -> Iterator[None]:
    """Give torch the share of its threads that one of several processes has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _time_writing(folder: Path) -> float:
    """Return the seconds of a byte that is written to the disk of a folder, in a file without a name."""
    data = os.urandom(_WRITTEN_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:

            def write() -> None:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

            return seconds_of(write) / _WRITTEN_BYTES
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}: choose another folder") from error
