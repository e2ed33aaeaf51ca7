"""Plan of a run: inputs opened, checked against each other and resolved before the first step.

`plan_run` builds a `Plan` from paths and settings. Several runs on the same data share one `LoadedInputs` instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kdfast
from kdfast.data.augment.presets import augment_source
from kdfast.data.loaders import Loader, make_loader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source, compute_normalization, sample_files
from kdfast.data.subset import Subset, check_subset_file, read_subset
from kdfast.data.views import Normalization
from kdfast.distill.batches import Batches
from kdfast.distill.config import Execution, RunConfig
from kdfast.distill.distributed import Distributed
from kdfast.distill.losses.alpha import parse_alpha
from kdfast.distill.losses.plan import TermPlan, collect_samples, plan_terms
from kdfast.distill.recipe.mixing import Mixing
from kdfast.distill.targets import CachedTargets, OnlineTargets, TeacherTargets
from kdfast.errors import UsageError
from kdfast.nets.checkpoint import Model, load_model
from kdfast.nets.fit import check_fit, check_training
from kdfast.nets.initial import build_started_net
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class InputPaths:
    """Paths of a run's inputs, and how to read the data.

    Attributes:
        data: A data source, see `kdfast.data.readers.registry`.
        subset: idx.npy, or None for the whole training split.
        cache: A teacher's cache, or None.
        teacher: A teacher to run during training; with a cache, the teacher that the cache must belong to; or None.
        loader: `auto`, `ffcv` or `resident`.
        size: Side of the stored images in pixels, for folders of larger images.
        order: Order of the samples of image folders, see `kdfast.data.readers.registry.open_source`.
        split: The test split of data that has none, see `kdfast.data.readers.registry.open_source`.
        augment: Augmentation in place of the data's own, see `kdfast.data.augment.presets.augment_source`; or None.
    """

    data: str
    subset: str | None = None
    cache: str | None = None
    teacher: str | None = None
    loader: str = "auto"
    size: int | None = None
    order: str = "path"
    split: str | None = None
    augment: str | None = None


@dataclass
class Plan:
    """Everything that `kdfast.distill.train.train` needs.

    Attributes:
        config: The settings, resolved.
        source: The data.
        ids: int64 (n,), the kept samples.
        loader: Loader of their images.
        targets: Source of the teacher's logits; None without a teacher.
        normalization: The student's input statistics.
        device: Where to train.
        distributed: This process among those of the run.
        identity: Settings and fingerprints of the inputs. Two runs are the same run if these are equal.
        metadata: Values for config.json: paths, device, versions.
        stage_seconds: Seconds spent in earlier stages, where known.
        execution: How the steps are computed.
        terms: What the terms of the loss read of both networks.
        teacher: The teacher, if it is at hand, to compare the student's predictions with.
    """

    config: RunConfig
    source: Source
    ids: NDArray[np.int64]
    loader: Loader
    targets: CachedTargets | OnlineTargets | None
    normalization: Normalization
    device: torch.device
    distributed: Distributed
    identity: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)
    terms: TermPlan = field(default_factory=TermPlan)
    teacher: Model | None = None

    def can_capture(self) -> bool:
        """Return whether a step may run as a CUDA graph.

        Not with several processes, whose reductions a graph would have to include, nor with the loss scale of float16,
        nor with views that the CPU draws.
        """
        return (
            self.execution.cuda_graph
            and self.device.type == "cuda"
            and self.distributed.world_size == 1
            and self.config.precision != "fp16"
            and not self.source.view_spec.is_drawn
        )

    def describe(self) -> dict[str, Any]:
        """Summarize the run: settings, inputs and sizes."""
        per_epoch = self.batches().per_epoch
        return {
            **self.identity,
            **self.metadata,
            "samples": len(self.ids),
            "of": len(self.source.train),
            "steps": per_epoch * self.config.epochs,
            "images": len(self.ids) * self.config.epochs,
        }

    def batches(self) -> Batches:
        """Return the run's seeded batches."""
        return Batches(
            self.ids,
            self.loader,
            self.source.view_spec,
            n_views=self.config.views,
            view_seed=self.config.view_seed or 0,
            targets=self.targets if isinstance(self.targets, CachedTargets) else None,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            device=self.device,
            distributed=self.distributed,
            mixing=self._mixing(),
        )

    def _mixing(self) -> Mixing | None:
        if not self.config.mixes:
            return None
        return Mixing(self.config.mixup, self.config.cutmix, self.source.view_spec.size)


@dataclass(frozen=True)
class LoadedInputs:
    """Opened inputs that any number of runs on the same data can share.

    Attributes:
        source: The data.
        loader: Loader of the training split's images.
        normalization: The student's input statistics.
        teacher: The teacher, or None; used regardless of alpha.
    """

    source: Source
    loader: Loader
    normalization: Normalization
    teacher: TeacherTargets

    def plan(
        self,
        config: RunConfig,
        ids: NDArray[np.int64],
        *,
        device: torch.device,
        distributed: Distributed | None = None,
        metadata: Mapping[str, Any] | None = None,
        stage_seconds: Mapping[str, float] | None = None,
        execution: Execution | None = None,
    ) -> Plan:
        """Plan a run on these inputs.

        Args:
            config: The settings. `views` and `view_seed` are resolved as `TeacherTargets.resolve_views` describes.
            ids: int64 (n,), the kept samples.
            device: Where to train.
            distributed: This process among those of the run; None for a single process.
            metadata: Values for config.json.
            stage_seconds: Seconds spent in earlier stages.
            execution: How the steps are computed.

        Returns:
            The plan.

        Raises:
            UsageError, CacheMismatch: If there are fewer views than requested.
        """
        source, distributed, execution = self.source, distributed or Distributed(), execution or Execution()
        config.check_total()
        config = self.teacher.resolve_views(config, source.view_spec.count)
        terms = self._plan_terms(config, ids, execution)
        targets = self.teacher.open(source, ids, config, device, terms.teacher)
        return Plan(
            config=config,
            source=source,
            ids=ids,
            loader=self.loader,
            targets=targets,
            normalization=self.normalization,
            device=device,
            distributed=distributed,
            identity={
                **config.to_dict(),
                "data": source.fingerprint,
                "subset": hashlib.sha256(np.sort(ids).tobytes()).hexdigest(),
                "augmentation": source.view_spec.to_dict(),
                "normalization": dataclasses.asdict(self.normalization),
                "targets": None if targets is None else targets.name,
                "teacher": self.teacher.identity(),
                "processes": distributed.world_size,
            },
            metadata={
                **(metadata or {}),
                "loader": self.loader.name,
                "device": str(device),
                "threads": torch.get_num_threads(),
                **dataclasses.asdict(execution),
                "kdfast": kdfast.__version__,
                "torch": torch.__version__,
            },
            stage_seconds={**(stage_seconds or {}), "compile loader": self.loader.compile_seconds},
            execution=execution,
            terms=terms,
            teacher=self.teacher.model,
        )

    def _plan_terms(self, config: RunConfig, ids: NDArray[np.int64], execution: Execution) -> TermPlan:
        """Plan the terms of the loss, and check that they can be computed as the run is."""
        if not config.terms:
            return TermPlan()
        with torch.random.fork_rng(devices=[]):
            student = build_started_net(config.student, len(self.source.classes), config.init)
        plan = plan_terms(
            config.terms,
            config.taps,
            student,
            self.teacher.model,
            self.teacher.cache,
            views=config.views,
            size=self.source.view_spec.size,
            samples=collect_samples(self.source, ids, config.seed),
        )
        if plan.student and execution.compile:
            raise UsageError("`compile` cannot read activations: omit it, or use terms of the logits alone")
        return plan


def plan_run(
    paths: InputPaths,
    config: RunConfig,
    *,
    device: torch.device,
    alpha: str | None = None,
    execution: Execution | None = None,
) -> Plan:
    """Open and check everything that a run needs, and plan it. Writes nothing.

    Args:
        paths: Paths of the inputs.
        config: The settings. `views` 0 means all views of the cache, or of the data without a cache; `view_seed` None
            means the cache's, or 0.
        device: Where to train.
        alpha: A number in [0, 1], or `auto`, as text; replaces `config.alpha` unless None.
        execution: How the steps are computed.

    Returns:
        The plan.

    Raises:
        UsageError: If options do not fit together.
        DataError, SubsetError, CacheMismatch, CheckpointError: If an input is damaged or does not fit the others.
    """
    distributed = Distributed.from_environment()
    device = distributed.local_device(device)
    if paths.subset is not None:
        check_subset_file(paths.subset)
    started = time.perf_counter()
    source = open_source(paths.data, size=paths.size, order=paths.order, split=paths.split)
    source, views = augment_source(source, paths.augment, config.views)
    config = dataclasses.replace(config, views=views)
    subset = _read_subset(paths.subset, source, config.batch_size)
    samples = len(subset.ids)
    distributed.check_batches(samples, config.batch_size)
    check_student(config, samples, source, distributed, device)
    if alpha is not None:
        most = 1.0 if config.ce is None else math.inf
        config = dataclasses.replace(config, alpha=parse_alpha(alpha, samples / len(source.train), most))
    stage_seconds = {"open data": time.perf_counter() - started}
    if subset.provenance and "seconds" in subset.provenance:
        stage_seconds["prune"] = float(subset.provenance["seconds"])
    teacher = TeacherTargets() if not config.needs_teacher else _open_teacher(paths, source, subset.ids, stage_seconds)
    loader = make_loader(source.train, paths.loader, device)
    inputs = LoadedInputs(source, loader, compute_normalization(source.train), teacher)
    # The identity has the names of an own network and its initial weights without the paths to them.
    metadata = {**dataclasses.asdict(paths), "student_spec": config.student, "init_path": config.init}
    return inputs.plan(
        config,
        subset.ids,
        device=device,
        distributed=distributed,
        metadata=metadata,
        stage_seconds=stage_seconds,
        execution=execution,
    )


def check_student(
    config: RunConfig, samples: int, source: Source, distributed: Distributed, device: torch.device | None = None
) -> None:
    """Check that the network exists, and that it can train on the batches of an epoch and be evaluated.

    One small batch runs through it. Batch norm over one value per channel has no variance, so that a last batch of one
    sample may fail.

    Raises:
        UsageError: The network does not exist, or cannot train on images of this size or on that batch.
    """
    classes, size = len(source.classes), source.view_spec.size
    net = build_started_net(config.student, classes, config.init)
    check_training(net, config.student, classes, size, device=device)
    last = samples % config.batch_size or config.batch_size
    if last // distributed.world_size > 1:
        return
    try:
        check_training(net, config.student, classes, size, batch=1, device=device)
    except UsageError as error:
        raise UsageError(
            f"the last batch of an epoch gives a process a single sample (of {samples}), and the network cannot train "
            f"on one ({error.__cause__ or error}): choose a `batch_size` other than {config.batch_size}"
        ) from error


def _read_subset(path: str | None, source: Source, batch_size: int) -> Subset:
    n = len(source.train)
    if path is not None:
        files = sample_files(source.train)
        return read_subset(path, n=n, fingerprint=source.fingerprint, batch_size=batch_size, files=files)
    if n < batch_size:
        raise UsageError(f"`batch_size` is {batch_size}, more than the {n} training samples: lower it")
    return Subset(ids=np.arange(n, dtype=np.int64), provenance=None, path=None)


def _open_teacher(
    paths: InputPaths, source: Source, ids: NDArray[np.int64], stage_seconds: dict[str, float]
) -> TeacherTargets:
    """Open the cache or the teacher, and add what they cost to `stage_seconds`."""
    if paths.cache is None and paths.teacher is None:
        raise UsageError(
            "`alpha` above 0 and terms of the loss need `cache` or `teacher`: pass one, or `alpha` 0 without terms to "
            "train without a teacher"
        )
    model = None if paths.teacher is None else load_model(paths.teacher)
    if model is not None and paths.teacher is not None:
        check_fit(model, source, paths.teacher)
    if paths.cache is None:
        return TeacherTargets(model=model)
    started = time.perf_counter()
    cache = TeacherCache.open(paths.cache, source=source, teacher=model)
    cache.check_covers(ids)
    stage_seconds["open cache"] = time.perf_counter() - started
    stage_seconds["cache"] = float(cache.manifest["seconds"])
    return TeacherTargets(cache=cache, model=model)
