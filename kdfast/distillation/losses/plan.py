"""What a run's terms read of both networks, found and checked before the first step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdfast.data.source import Source
from kdfast.distillation.losses.base import RunSamples, Shape, TapShapes
from kdfast.distillation.losses.settings import SIDES, TermSetting
from kdfast.distillation.losses.total import (
    LossTerms,
    Places,
    check_shapes,
    check_single_sample,
    choose_places,
    probe_shapes,
    required_taps,
)
from kdfast.errors import CacheMismatch, UsageError
from kdfast.nets.checkpoint import Model
from kdfast.teacher.cache import TeacherCache

# The cache holds the features of the unaugmented image alone.
POOLED = ("pooled",)


@dataclass(frozen=True)
class TermPlan:
    """Where to read the activations that the terms need.

    Attributes:
        student: Places in the student.
        teacher: Places in an online teacher; empty with a cache.
        shapes: Shapes of the taps.
    """

    student: Places = field(default_factory=dict)
    teacher: Places = field(default_factory=dict)
    shapes: TapShapes = field(default_factory=TapShapes)


def plan_terms(
    settings: tuple[TermSetting, ...],
    taps: tuple[tuple[str, str], ...],
    student: nn.Module,
    teacher: Model | None,
    cache: TeacherCache | None,
    *,
    views: int,
    size: tuple[int, int],
    samples: RunSamples,
    smallest: int,
) -> TermPlan:
    """Find the taps of the terms and check that they fit.

    Args:
        settings: The terms.
        taps: Places that replace the default ones, as in `RunConfig.taps`.
        student: A network like the student.
        teacher: The teacher that runs during training, or None.
        cache: The teacher's cache, or None.
        views: Number of views per sample in the run.
        size: Height and width of the images.
        samples: The samples of the run.
        smallest: Samples of the smallest batch.

    Raises:
        UsageError: A tap has no place, or one that cannot be read; a place is of no tap; or a term does not fit the
            networks or the samples.
        CacheMismatch: The terms need more than the cache holds.
    """
    given = _by_side(taps)
    names = required_taps(settings)
    _check_places(given, names, cached=cache is not None)
    if cache is not None and settings:
        _check_cache(cache, names, views)
    student_places = choose_places(student, names, given["student"], "student")
    theirs: dict[str, Shape] = {}
    teacher_places: dict[str, str] = {}
    if teacher is not None and cache is None:
        teacher_places = choose_places(teacher.net, names, given["teacher"], "teacher")
        theirs = probe_shapes(teacher.net, teacher_places, size)
    elif cache is not None and names:
        theirs = {"pooled": (cache.manifest["features"],)}
    plan = TermPlan(student_places, teacher_places, TapShapes(probe_shapes(student, student_places, size), theirs))
    check_shapes(settings, plan.shapes)
    with torch.random.fork_rng(devices=[]):
        terms = LossTerms(settings, plan.shapes, samples)
    if smallest == 1:
        check_single_sample(terms, plan.shapes)
    return plan


def collect_samples(source: Source, ids: NDArray[np.int64], seed: int) -> RunSamples:
    """Return the samples of a run with their labels, in ascending order."""
    ordered = np.sort(ids)
    return RunSamples(ordered, source.train.labels[ordered], seed)


def _by_side(taps: tuple[tuple[str, str], ...]) -> dict[str, dict[str, str]]:
    given: dict[str, dict[str, str]] = {side: {} for side in SIDES}
    for key, place in taps:
        side, _, name = key.partition(".")
        given[side][name] = place
    return given


def _check_places(given: dict[str, dict[str, str]], names: tuple[str, ...], *, cached: bool) -> None:
    for side, places in given.items():
        for name in places:
            if name not in names:
                raise UsageError(f"`tap` names {side}.{name}, which no term of the loss reads: omit it")
            if cached and side == "teacher":
                raise UsageError(f"`tap` names {side}.{name}, and the cache holds the teacher's features: omit it")


def _check_cache(cache: TeacherCache, names: tuple[str, ...], views: int) -> None:
    if cache.top_k is not None:
        raise CacheMismatch(
            f"{cache.path} holds {cache.top_k.k} classes of each sample, and a term needs all: build a cache of "
            "features (`kind`) or of all classes, or pass `teacher` instead of `cache`"
        )
    if names and not cache.has_features:
        raise CacheMismatch(
            f"{cache.path} holds imported logits without features, and a term needs them: import it with `features`, "
            "or use terms of the logits"
        )
    if set(names) <= set(POOLED) and (views == 1 or not names):
        return
    others = ", ".join(name for name in names if name not in POOLED)
    what, also = (f"its {others}", "") if others else (f"{views} views", ", or pass `views` 1")
    raise CacheMismatch(
        f"a term needs the teacher's activations for {what}, and a cache holds pooled features of the unaugmented "
        f"image: pass `teacher` instead of `cache`{also}"
    )
