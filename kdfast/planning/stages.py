"""Seconds and bytes of each stage: amounts of work times the rates of the machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kdfast.planning.rates import Rates
from kdfast.planning.request import Amounts


@dataclass(frozen=True)
class Sizes:
    """Bytes of what the stages write.

    Attributes:
        cache: Returns the bytes of a cache of so many samples and views of each.
        recorded: Recorded dynamics, all of them.
        network: The teacher's file.
        run: A run's folder while it trains, with its checkpoints.
    """

    cache: Callable[[int, int], int] = lambda samples, views: 0
    recorded: int = 0
    network: int = 0
    run: int = 0


@dataclass(frozen=True)
class Stage:
    """What a stage takes.

    Attributes:
        name: Its name.
        work: What it does, in words.
        parts: Seconds by part of the work.
        size: Bytes that it writes.
    """

    name: str
    work: str
    parts: Mapping[str, float] = field(default_factory=dict)
    size: int = 0

    @property
    def seconds(self) -> float:
        """Seconds of the stage."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Flow:
    """The stages from the data to the students.

    Attributes:
        once: Stages whose results all students share.
        each: The stage of one student.
        students: Number of students.
        jobs: How many of them train at a time.
    """

    once: tuple[Stage, ...]
    each: Stage
    students: int = 1
    jobs: int = 1

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return self.shared_seconds + math.ceil(self.students / self.jobs) * self.each.seconds

    @property
    def size(self) -> int:
        """Bytes that all stages write."""
        return sum(stage.size for stage in self.once) + self.students * self.each.size

    @property
    def shared_seconds(self) -> float:
        """Seconds of the stages whose results all students share."""
        return sum(stage.seconds for stage in self.once)


def pruned_flow(amounts: Amounts, rates: Rates, sizes: Sizes) -> Flow:
    """Return the stages of distilling on the kept samples."""
    stages = _Stages(amounts, rates, sizes)
    once = [*stages.recording(), *stages.scoring(), stages.selection()]
    if amounts.views and amounts.whole:
        once = [stages.cache(amounts.samples, amounts.views), *once]
    elif amounts.views:
        once.append(stages.cache(amounts.kept, amounts.views))
    once = [*stages.reading(), *once]
    return Flow(tuple(once), stages.training(amounts.steps, amounts.images), amounts.students, amounts.jobs)


def whole_flow(amounts: Amounts, rates: Rates, sizes: Sizes, *, same_steps: bool) -> Flow:
    """Return the stages of distilling on all samples, for as many epochs or for as many steps."""
    stages = _Stages(amounts, rates, sizes)
    once = (*stages.reading(), *([stages.cache(amounts.samples, amounts.views)] if amounts.views else []))
    steps = amounts.steps if same_steps else amounts.all_steps
    images = amounts.all_images * steps / amounts.all_steps
    return Flow(once, stages.training(steps, images), amounts.students, amounts.jobs)


@dataclass(frozen=True)
class _Stages:
    """Makes the stages of a plan, each of which also opens the data."""

    amounts: Amounts
    rates: Rates
    sizes: Sizes

    def stage(self, name: str, work: str, parts: Mapping[str, float], size: int) -> Stage:
        return Stage(name, work, {"open": self.rates.opening, **parts}, size)

    def reading(self) -> list[Stage]:
        """Return what the first commands on image files do before their work, if it is not remembered."""
        samples, rates = self.amounts.samples, self.rates
        parts = {"fingerprint": samples * rates.digested, "statistics": samples * rates.summed}
        return [Stage("first reading", f"{samples} samples", parts)] if any(parts.values()) else []

    def recording(self) -> list[Stage]:
        amounts = self.amounts
        if not amounts.recorded_epochs:
            return []
        parts = {
            "load": amounts.samples * self.rates.loading,
            "train and record": amounts.recorded_epochs * amounts.samples * self.rates.recorded,
        }
        work = f"{amounts.recorded_epochs} epochs of {amounts.samples} samples"
        return [self.stage("dynamics", work, parts, self.sizes.recorded)]

    def scoring(self) -> list[Stage]:
        """Return what the selection needs of the teacher: a cache, or the teacher flattened and differentiated."""
        amounts, rates, stages = self.amounts, self.rates, []
        if amounts.scored_views:
            stages.append(self.cache(amounts.samples, amounts.scored_views, "cache for scores"))
        if amounts.flattening:
            seconds = {"steps": amounts.flattening * rates.flattened}
            stages.append(self.stage("flatten", f"{amounts.flattening} steps", seconds, self.sizes.network))
        if amounts.scores_network:
            parts = {"gradients": amounts.samples * rates.scored}
            if amounts.fisher:
                parts = {"fisher": amounts.fisher * rates.fisher, **parts}
            stages.append(self.stage("score", f"gradients of {amounts.samples} samples", parts, 8 * amounts.samples))
        return stages

    def selection(self) -> Stage:
        kept, samples = self.amounts.kept, self.amounts.samples
        return self.stage("prune", f"{kept} of {samples} samples", {"select": self.rates.selection}, 8 * kept)

    def cache(self, samples: int, views: int, name: str = "cache") -> Stage:
        rates, size = self.rates, self.sizes.cache(samples, views)
        parts = {
            "teacher": samples * (rates.cached + (views - 1) * rates.view),
            "write": size * rates.written,
            "evaluate": self.amounts.tested * rates.teacher_tested,
        }
        return self.stage(name, f"{samples} samples x {views} view{'s' * (views > 1)}", parts, size)

    def training(self, steps: int, images: float) -> Stage:
        amounts, rates = self.amounts, self.rates
        initial = images * amounts.initial
        parts = {
            "load": amounts.samples * rates.loading,
            "train": (images - initial) * rates.trained + initial * rates.initial,
            "evaluate": amounts.tested * (rates.tested + (rates.teacher_tested if amounts.online else 0.0)),
        }
        return self.stage("distill", f"{steps} steps of {amounts.batch_size}", parts, self.sizes.run)
