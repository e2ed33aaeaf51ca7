"""What is checked before the first run of a study: students, artefacts that are missing, and terms of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from kdfast.data.source import Source
from kdfast.data.subset import class_budgets, subset_size
from kdfast.distillation.inputs import check_student
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.record_dynamics import check_recording
from kdfast.distillation.targets import TeacherTargets
from kdfast.errors import SubsetError, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.select import SelectionMethod, SubsetPipeline
from kdfast.reproduction.cells import Cell, resolve
from kdfast.reproduction.engine.config import ReproductionConfig
from kdfast.reproduction.engine.places import Places
from kdfast.reproduction.engine.teachers import TEACHER_SEED, excluded_samples


def check_students(config: ReproductionConfig, source: Source, device: torch.device) -> None:
    """Check that the students of all cells can be trained on their share of the data.

    Raises:
        UsageError: A student does not exist or does not fit the data, or a seed is that of the teachers.
        SubsetError: A fraction keeps too few samples.
    """
    if TEACHER_SEED in config.seeds:
        raise UsageError(f"`seeds` has {TEACHER_SEED}, the seed of the teachers and of their data: pass others")
    labels = source.train.labels
    checked = set()
    for cell in config.cells:
        samples, trained = subset_size(len(labels), cell.fraction), config.run_config(cell, 0, len(labels))
        place = (cell.student, samples, trained.batch_size)
        if place in checked:
            continue
        checked.add(place)
        class_budgets(labels, samples)
        if samples < trained.batch_size:
            raise SubsetError(
                f"the fraction {cell.fraction:g} keeps {samples} of {len(labels)} samples, fewer than one batch of "
                f"{trained.batch_size}: leave it out with `fractions`"
            )
        try:
            check_student(trained, samples, source, device)
        except UsageError as error:
            raise UsageError(f"{config.study.argument}, student {cell.student}: {error}") from error


def check_artifacts(places: Places, cells: Iterable[Cell], source: Source, device: torch.device) -> None:
    """Check that what is missing for cells can be trained, and that their samples can be chosen.

    Raises:
        UsageError: A network does not exist or does not fit the data, or the recording does not.
        SubsetError: A teacher's share of the data is too small, or it leaves too few samples for the student's.
    """
    samples = len(source.train)
    checked: set[object] = set()
    for cell in cells:
        needs = resolve(cell.method).inputs
        if cell.kd or needs & {"cache", "teacher"}:
            spec = places.teacher_spec(cell)
            if spec.given is None and spec.name not in checked:
                checked.add(spec.name)
                kept = subset_size(samples, spec.fraction)
                class_budgets(source.train.labels, kept)
                check_student(places.teacher_config(spec.net), kept, source, device)
        if "dynamics" in needs and places.given_dynamics is None and "dynamics" not in checked:
            checked.add("dynamics")
            check_student(places.recorded, samples, source, device)
            check_recording(places.recorded, places.recording, source)
        shares = (cell.fraction, cell.teacher_fraction)
        if cell.disjoint and shares not in checked:
            checked.add(shares)
            _check_disjoint(cell, source)


def _check_disjoint(cell: Cell, source: Source) -> None:
    pipeline = SubsetPipeline(ScoreSources(source), exclude=excluded_samples(source, cell))
    try:
        pipeline.check(SelectionMethod("random", rule="hard"), cell.fraction)
    except SubsetError as error:
        raise SubsetError(
            f"a teacher on {cell.teacher_fraction:g} of the data leaves too few samples for a student on "
            f"{cell.fraction:g}: leave these cells out with `restrict`, or lower a share in the study"
        ) from error


def check_terms(config: ReproductionConfig, inputs: LoadedInputs, device: torch.device) -> None:
    """Check that terms which read activations fit the networks, on networks that are not trained.

    Raises:
        UsageError: One does not.
    """
    source = inputs.source
    classes, samples, checked = len(source.classes), len(source.train), set()
    for cell in config.cells:
        place = (cell.student, cell.teacher, cell.term, cell.fraction)
        if cell.term is None or cell.teacher is None or place in checked:
            continue
        checked.add(place)
        with torch.random.fork_rng(devices=[]):
            net = build_net(cell.teacher, classes).eval()
        model = Model(net, cell.teacher, classes, source.classes, inputs.normalization)
        with_teacher = dataclasses.replace(inputs, teacher=TeacherTargets(model=model))
        ids = np.arange(subset_size(samples, cell.fraction), dtype=np.int64)
        with_teacher.plan(config.run_config(cell, 0, samples), ids, device=device)
