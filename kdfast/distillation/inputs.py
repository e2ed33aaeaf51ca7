"""Open a run's inputs, check them against each other, and plan the run."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdfast.data.augment.presets import augment_source
from kdfast.data.loaders import make_loader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source, compute_normalization
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import Subset, check_subset_file, open_subset
from kdfast.distillation.config import Execution, RunConfig
from kdfast.distillation.losses.alpha import parse_alpha
from kdfast.distillation.plan import LoadedInputs, Plan
from kdfast.distillation.targets import TeacherTargets
from kdfast.distributed.group import Distributed
from kdfast.errors import UsageError
from kdfast.nets.checkpoint import Model, load_model
from kdfast.nets.fit import check_channels, check_fit, check_training
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
        loader: `auto`, or a key of `kdfast.data.loaders.LOADERS`.
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


def plan_run(
    paths: InputPaths,
    config: RunConfig,
    *,
    device: torch.device,
    alpha: str | None = None,
    execution: Execution | None = None,
    choose: Callable[[Source], Subset] | None = None,
) -> Plan:
    """Open and check everything that a run needs, and plan it. Writes nothing.

    Args:
        paths: Paths of the inputs.
        config: The settings. `views` 0 means all views of the cache, or of the data without a cache; `view_seed` None
            means the cache's, or 0.
        device: Where to train.
        alpha: A number in [0, 1], or `auto`, as text; replaces `config.alpha` unless None.
        execution: How the steps are computed.
        choose: Returns the samples to train on, in place of `paths.subset`.

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
    subset = _read_subset(paths.subset, source, config.batch_size) if choose is None else choose(source)
    stage_seconds = {"open data": time.perf_counter() - started}
    return plan_opened(
        source,
        subset,
        config,
        lambda: _open_teacher(paths, source, subset.ids, stage_seconds),
        loader=paths.loader,
        device=device,
        distributed=distributed,
        alpha=alpha,
        execution=execution,
        paths=dataclasses.asdict(paths),
        stage_seconds=stage_seconds,
    )


def plan_opened(
    source: Source,
    subset: Subset,
    config: RunConfig,
    open_teacher: Callable[[], TeacherTargets],
    *,
    loader: str,
    device: torch.device,
    distributed: Distributed,
    alpha: str | None,
    execution: Execution | None,
    paths: Mapping[str, Any],
    stage_seconds: dict[str, float],
) -> Plan:
    """Check and plan a run on data that is open.

    Args:
        source: The data, augmented as the run shall.
        subset: The kept samples.
        config: The settings, see `plan_run`.
        open_teacher: Returns the teacher; called only if the loss needs one, and after cheaper checks.
        loader: `auto`, or a key of `kdfast.data.loaders.LOADERS`.
        device: The device of this process.
        distributed: This process among those of the run.
        alpha: See `plan_run`.
        execution: How the steps are computed.
        paths: Values for config.json: where the inputs come from.
        stage_seconds: Seconds spent in earlier stages; the time that pruning took is added.

    Raises:
        UsageError, DataError, CacheMismatch, CheckpointError: As for `plan_run`.
    """
    samples = len(subset.ids)
    distributed.check_batches(samples, config.batch_size)
    check_student(config, samples, source, device)
    if alpha is not None:
        most = 1.0 if config.ce is None else math.inf
        config = dataclasses.replace(config, alpha=parse_alpha(alpha, samples / len(source.train), most))
    if subset.provenance and "seconds" in subset.provenance:
        stage_seconds["prune"] = float(subset.provenance["seconds"])
    teacher = open_teacher() if config.needs_teacher else TeacherTargets()
    opened = make_loader(source.train, loader, device)
    inputs = LoadedInputs(source, opened, compute_normalization(source.train), teacher)
    # The identity has the names of an own network and its initial weights without the paths to them.
    metadata = {**paths, "student_spec": config.student, "init_path": config.init}
    return inputs.plan(
        config,
        subset.ids,
        device=device,
        distributed=distributed,
        metadata=metadata,
        stage_seconds=stage_seconds,
        execution=execution,
    )


def check_student(config: RunConfig, samples: int, source: Source, device: torch.device | None = None) -> None:
    """Check that the network exists, and that it can train on the batches of an epoch and be evaluated.

    One small batch runs through it. Batch norm over one value per channel has no variance, so that a last batch of one
    sample may fail.

    Raises:
        UsageError: The network does not exist, or cannot train on images of this size or on that batch.
    """
    classes, size = len(source.classes), source.view_spec.size
    net = build_started_net(config.student, classes, config.init)
    check_channels(net, config.student, source)
    check_training(net, config.student, classes, size, device=device)
    if samples % config.batch_size != 1:
        return
    try:
        check_training(net, config.student, classes, size, batch=1, device=device)
    except UsageError as error:
        raise UsageError(
            f"the last batch of an epoch has a single sample (of {samples}), and the network cannot train on one "
            f"({error.__cause__ or error}): choose a `batch_size` other than {config.batch_size}"
        ) from error


def _read_subset(path: str | None, source: Source, batch_size: int) -> Subset:
    if path is not None:
        return open_subset(path, source, batch_size=batch_size)
    n = len(source.train)
    if n < batch_size:
        raise UsageError(f"`batch_size` is {batch_size}, more than the {n} training samples: lower it")
    return Subset(ids=np.arange(n, dtype=np.int64), provenance=None, path=None)


def _open_teacher(paths: InputPaths, source: Source, ids: IntArray, stage_seconds: dict[str, float]) -> TeacherTargets:
    """Open the cache or the teacher, and add what they cost to `stage_seconds`."""
    model = None if paths.teacher is None else load_model(paths.teacher)
    if model is not None and paths.teacher is not None:
        check_fit(model, source, paths.teacher)
    started = time.perf_counter()
    targets = open_targets(source, ids, paths.cache, model)
    if targets.cache is not None:
        stage_seconds["open cache"] = time.perf_counter() - started
        stage_seconds["cache"] = float(targets.cache.manifest["seconds"])
    return targets


def open_targets(
    source: Source, ids: IntArray, cache: str | os.PathLike[str] | None, model: Model | None
) -> TeacherTargets:
    """Open the teacher of a run whose loss needs one.

    Args:
        source: The data.
        ids: int64 (n,), the kept samples, which the cache must cover.
        cache: Folder of a teacher's cache, or None.
        model: The teacher, checked against the data; with a cache, the one that the cache must belong to; or None.

    Raises:
        UsageError: There is neither.
        CacheMismatch: The cache is damaged, belongs to other data or another teacher, or lacks samples.
    """
    if cache is None and model is None:
        raise UsageError(
            "`alpha` above 0 and terms of the loss need `cache` or `teacher`: pass one, or `alpha` 0 without terms to "
            "train without a teacher"
        )
    if cache is None:
        return TeacherTargets(model=model)
    opened = TeacherCache.open(cache, source=source, teacher=model)
    opened.check_covers(ids)
    return TeacherTargets(cache=opened, model=model)
