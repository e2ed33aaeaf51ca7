"""What is to be planned: data, networks, selection and recipe; and which stages that takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdfast.data.order import batch_count
from kdfast.data.source import Source
from kdfast.data.subset import subset_size
from kdfast.distillation.config import Execution, RunConfig
from kdfast.distillation.losses.plan import POOLED
from kdfast.distillation.record_dynamics import RecordingConfig
from kdfast.errors import UsageError
from kdfast.nets.checkpoint import Model
from kdfast.pruning.flat_scores import FVM, is_flattened
from kdfast.pruning.options import complete_options
from kdfast.pruning.request import BRIEF_ITERATIONS, BRIEF_SCORE, PruneRequest
from kdfast.pruning.rules.registry import get_rule
from kdfast.pruning.scores.registry import get_score
from kdfast.pruning.select import published_rule
from kdfast.teacher.build import Dtype, Kind
from kdfast.teacher.flatten.config import FlattenConfig
from kdfast.teacher.plan import DEFAULT_TEMPERATURE, default_top_k, default_views
from kdfast.teacher.predictor import Precision
from kdfast.teacher.row_format import TopK

# What the guides record for scores that need more than the default.
_KEEP, _TOP_K = 0.7, 10
_MADE = Path("made by an earlier stage")


@dataclass(frozen=True)
class CacheSettings:
    """How the teacher's cache is made.

    Attributes:
        dtype: dtype of the rows.
        top_k: Classes to keep of each view; None for all.
        kind: Whether it holds logits or features.
        precision: Arithmetic of the teacher.
        whole: One cache of all samples for every later subset, instead of one of the kept samples.
    """

    dtype: Dtype = "float16"
    top_k: TopK | None = None
    kind: Kind = "logits"
    precision: Precision = "float32"
    whole: bool = False


@dataclass(frozen=True)
class PlanRequest:
    """The flow to plan.

    Attributes:
        fraction: Share of the training split to keep.
        config: Settings of the student's training; `views` 0 means all of the data.
        selection: How to select, without the inputs that earlier stages make.
        cache: How the teacher's cache is made.
        online: Whether the teacher runs during training, in place of a cache.
        recorded: The network and its epochs whose dynamics are recorded, if the selection needs any.
        recording: How they are recorded.
        loader: `auto`, or a key of the loaders.
        execution: How the steps are computed.
        students: Students to train on the subset.
        jobs: How many of them train at a time, each in a process with its share of the CPU's threads.
        device: Where to compute.
        seconds: Seconds that the measurements may take, about.
        out: A folder on the disk that the outputs will be written to.
    """

    fraction: float
    config: RunConfig
    selection: PruneRequest
    cache: CacheSettings = field(default_factory=CacheSettings)
    online: bool = False
    recorded: RunConfig | None = None
    recording: RecordingConfig = field(default_factory=RecordingConfig)
    loader: str = "auto"
    execution: Execution = field(default_factory=Execution)
    students: int = 1
    jobs: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 15.0
    out: Path = Path(".")


@dataclass(frozen=True)
class Amounts:
    """How much work the stages have.

    Attributes:
        samples: Training samples, N.
        tested: Test images.
        kept: Samples that are kept.
        views: Views of a sample in the cache for the student; 0 without one.
        scored_views: Views of every sample in a cache for the selection alone; 0 without one.
        whole: Whether the student's cache holds every sample.
        recorded_epochs: Epochs of recorded training, over all runs; 0 without dynamics.
        flattening: Steps that flatten the teacher; 0 if it does not have to be.
        fisher: Samples of the Fisher; 0 without a network's score.
        scores_network: Whether every sample is scored by differentiating the network.
        batch_size: Samples of a step.
        steps: Steps of the student's training on the kept samples.
        all_steps: Steps on all samples for as many epochs.
        initial: Share of the steps in which some terms train alone.
        online: Whether the teacher runs during training.
        students: Students to train.
        jobs: How many of them at a time.
    """

    samples: int
    tested: int
    kept: int
    views: int
    scored_views: int
    whole: bool
    recorded_epochs: int
    flattening: int
    fisher: int
    scores_network: bool
    batch_size: int
    steps: int
    all_steps: int
    initial: float
    online: bool
    students: int = 1
    jobs: int = 1

    @property
    def images(self) -> float:
        """Images of the training on the kept samples."""
        return self.steps * self.kept / batch_count(self.kept, self.batch_size)

    @property
    def all_images(self) -> float:
        """Images of the training on all samples for as many epochs."""
        return self.all_steps * self.samples / batch_count(self.samples, self.batch_size)


def complete_selection(request: PlanRequest) -> PruneRequest:
    """Return the selection with the inputs that it needs, which earlier stages make.

    Raises:
        UsageError: As `PruneRequest.check`.
    """
    selection = request.selection
    method = selection.method or "random"
    if selection.uses_selector:
        found = dataclasses.replace(selection, cache=_MADE, teacher=_MADE if selection.teacher else None)
        found.check()
        return found
    selection.check()
    score_options = complete_options(method, get_score(method).options, selection.score_options)
    usable = get_score(method).usable_inputs(score_options)
    rule = get_rule(selection.rule or published_rule(method))
    wanted = rule.required(complete_options(f"rule {selection.rule!r}", rule.options, selection.options))
    from_cache = "cache" in usable or "features" in wanted
    from_dynamics = "dynamics" in usable and ("cache" not in usable or bool(wanted - {"features"}))
    return dataclasses.replace(
        selection, cache=_MADE if from_cache else None, dynamics=_MADE if from_dynamics else None
    )


def differentiates(selection: PruneRequest) -> str | None:
    """Return the score of a selection that differentiates the network; None if it has none."""
    if selection.ranks_by_fvm:
        return FVM
    method = selection.method or "random"
    if selection.uses_selector:
        return None
    options = complete_options(method, get_score(method).options, selection.score_options)
    return method if "teacher" in get_score(method).usable_inputs(options) else None


def flattening_of(selection: PruneRequest, model: Model | None) -> FlattenConfig | None:
    """Return how the teacher is flattened for a selection; None if it is not."""
    if model is None or differentiates(selection) != FVM or is_flattened(model):
        return None
    return FlattenConfig(iterations=BRIEF_ITERATIONS) if selection.ranks_by_fvm else FlattenConfig()


def measure_amounts(request: PlanRequest, source: Source, model: Model | None, held_out: int) -> Amounts:
    """Return the work of a request on its data.

    Args:
        request: The request, with its selection complete.
        source: The data, augmented as the run shall.
        model: The teacher, or None.
        held_out: Samples that a flattened teacher is fine-tuned on.

    Raises:
        UsageError, SubsetError: A number does not fit the data.
    """
    config, selection, samples = request.config, request.selection, len(source.train)
    kept = subset_size(samples, request.fraction)
    if kept < config.batch_size:
        raise UsageError(f"`batch_size` is {config.batch_size}, more than the {kept} samples that are kept: lower it")
    per_epoch, all_per_epoch = (batch_count(count, config.batch_size) for count in (kept, samples))
    config = config.resolve_steps(per_epoch)
    steps = config.count_steps(per_epoch)
    cached = config.needs_teacher and not request.online
    views = (config.views or default_views(source.view_spec)) if cached else 0
    whole = cached and request.cache.whole
    score = differentiates(selection)
    fisher = 0
    if score == FVM:
        brief = BRIEF_SCORE if selection.ranks_by_fvm else {}
        fitted = {**brief, **selection.score_options}.get("fisher", "train")
        fisher = samples if fitted == "train" else held_out
    flattening = flattening_of(selection, model)
    recording = request.recording
    epochs = 0 if request.recorded is None else request.recorded.epochs * len(recording.selected_runs)
    return Amounts(
        samples=samples,
        tested=len(source.test),
        kept=kept,
        views=views,
        scored_views=1 if selection.cache is not None and not whole else 0,
        whole=whole,
        recorded_epochs=epochs if selection.dynamics is not None else 0,
        flattening=0 if flattening is None else flattening.iterations,
        fisher=fisher,
        scores_network=score is not None,
        batch_size=config.batch_size,
        steps=steps,
        all_steps=round(steps / per_epoch * all_per_epoch),
        initial=config.initial_phase * per_epoch / steps,
        online=config.needs_teacher and request.online,
        students=request.students,
        jobs=request.jobs,
    )


def recording_for(selection: PruneRequest, runs: int, classes: int) -> RecordingConfig:
    """Return how dynamics are recorded for a selection, as its score needs them."""
    score = selection.method or ""
    return RecordingConfig(
        runs=runs,
        keep=_KEEP if score == "memorization" else 1.0,
        top_k=min(_TOP_K, classes) if score == "tdds" else 0,
        record="batch" if selection.score_options.get("when") == "batch" else "epoch",
    )


def choose_classes(top_k: int | None, source: Source, kind: str) -> TopK | None:
    """Return the classes that a cache keeps of each view, as `kdfast cache` chooses them; None: all.

    Args:
        top_k: Their number; 0: all; None: the default of the data.
        source: The data.
        kind: Whether the cache holds logits or features.
    """
    if top_k is None:
        top_k = default_top_k(source.view_spec, len(source.classes)) if kind == "logits" else 0
    return TopK(top_k, DEFAULT_TEMPERATURE) if top_k else None


def needs_online_teacher(config: RunConfig) -> bool:
    """Return whether a term of the loss reads what no cache holds."""
    taps = {tap for term in config.terms for tap in term.entry.taps}
    return bool(taps) and (not taps <= set(POOLED) or config.views != 1)
