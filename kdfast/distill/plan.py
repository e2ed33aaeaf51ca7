"""From what the user asked for to everything a run needs, opened and checked before the first step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data.loaders import Loader, make_loader
from kdfast.data.sources import Source, normalization_of, open_source
from kdfast.data.subset import Subset, read_subset
from kdfast.data.views import Normalization
from kdfast.distill.batches import Batches
from kdfast.distill.config import RunConfig
from kdfast.distill.ranks import Ranks
from kdfast.distill.schedule import parse_alpha
from kdfast.distill.targets import CachedTargets, OnlineTargets, Targets
from kdfast.errors import CheckpointError, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, load_model
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class Inputs:
    """The files of a run.

    Attributes:
        data: A source of data, see `kdfast.data.sources`.
        subset: idx.npy, or None for the whole training split.
        cache: A teacher's cache, or None.
        teacher: A teacher to run on the fly; with a cache, the one the cache must have been made by; or None.
        loader: `auto`, `ffcv` or `resident`.
        size: Side of the stored images, for folders of larger ones.
    """

    data: str
    subset: str | None = None
    cache: str | None = None
    teacher: str | None = None
    loader: str = "auto"
    size: int | None = None


@dataclass
class Plan:
    """Everything that `kdfast.distill.train.train` needs.

    Attributes:
        config: The settings.
        source: The data.
        ids: int64 (n,), the kept samples.
        loader: Yields their images.
        targets: The teacher's side; None when alpha is 0.
        normalization: The student's input statistics.
        device: Where to train.
        ranks: This process among those of the run.
        identity: Fingerprints of the inputs, and the settings: what makes two runs the same run.
        costs: Seconds of the stages before this one, where known.
    """

    config: RunConfig
    source: Source
    ids: NDArray[np.int64]
    loader: Loader
    targets: Targets | None
    normalization: Normalization
    device: torch.device
    ranks: Ranks
    identity: dict[str, Any]
    costs: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What the run would do: settings, sizes, inputs."""
        per_epoch = self.batches().per_epoch
        return {
            **self.identity,
            "samples": len(self.ids),
            "of": len(self.source.train),
            "steps": per_epoch * self.config.epochs,
            "images": len(self.ids) * self.config.epochs,
            "loader": self.loader.name,
            "device": str(self.device),
        }

    def batches(self) -> Batches:
        """The run's seeded batches."""
        return Batches(
            self.ids,
            self.loader,
            self.source.views,
            n_views=self.config.views,
            view_seed=self.config.view_seed,
            targets=self.targets,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            ranks=self.ranks,
        )


def prepare(inputs: Inputs, settings: Mapping[str, Any], *, alpha: str, device: torch.device) -> Plan:
    """Open and check everything a run needs; write nothing.

    Args:
        inputs: The files.
        settings: Fields of `RunConfig` other than alpha. `views` 0 means all the cache holds, or all there are.
        alpha: A number in [0, 1], or `auto`.
        device: Where to train.

    Returns:
        The plan.

    Raises:
        UsageError: If options do not fit together.
        DataError, SubsetError, CacheMismatch, CheckpointError: If an input is damaged or does not fit the others.
    """
    config = RunConfig(**settings)
    ranks = Ranks.from_environment()
    device = ranks.device(device)
    started = time.perf_counter()
    source = open_source(inputs.data, size=inputs.size)
    build_net(config.student, len(source.classes))
    subset = _subset(inputs.subset, source, config.batch_size)
    ranks.check(len(subset.ids), config.batch_size)
    weight = parse_alpha(alpha, len(subset.ids) / len(source.train))
    if weight > 0 and inputs.cache is None and inputs.teacher is None:
        raise UsageError(f"--alpha {alpha} needs --cache or --teacher; plain training is --alpha 0")
    costs = {"open data": time.perf_counter() - started}
    if subset.provenance and "seconds" in subset.provenance:
        costs["prune"] = float(subset.provenance["seconds"])
    cache, teacher = (None, None) if weight == 0 else _teacher_side(inputs, source, subset.ids, costs)
    views = _count_views(config.views, source.views.count, cache)
    config = RunConfig(**{**settings, "alpha": weight, "views": views})
    targets: Targets | None = None
    if cache is not None:
        targets = CachedTargets(cache, views, config.view_seed, device)
    elif teacher is not None:
        targets = OnlineTargets(teacher, source.views, device)
    loader = make_loader(source.train, inputs.loader, device)
    costs["compile loader"] = getattr(loader, "compile_seconds", 0.0)
    return Plan(
        config=config,
        source=source,
        ids=subset.ids,
        loader=loader,
        targets=targets,
        normalization=normalization_of(source.train),
        device=device,
        ranks=ranks,
        identity={
            **config.to_dict(),
            "data": source.fingerprint,
            "subset": hashlib.sha256(np.sort(subset.ids).tobytes()).hexdigest(),
            "teacher": None if targets is None else (cache.teacher_digest if cache else teacher and teacher.digest),
            "targets": None if targets is None else targets.name,
            "processes": ranks.world,
        },
        costs=costs,
    )


def _subset(path: str | None, source: Source, batch_size: int) -> Subset:
    n = len(source.train)
    if path is not None:
        return read_subset(path, n=n, fingerprint=source.fingerprint, batch_size=batch_size)
    if n < batch_size:
        raise UsageError(f"--batch-size {batch_size} is larger than the {n} training samples; lower it")
    return Subset(ids=np.arange(n, dtype=np.int64), provenance=None, path=None)


def _teacher_side(
    inputs: Inputs, source: Source, ids: NDArray[np.int64], costs: dict[str, float]
) -> tuple[TeacherCache | None, Model | None]:
    teacher = None if inputs.teacher is None else load_model(inputs.teacher)
    if teacher is not None and teacher.classes != len(source.classes):
        raise CheckpointError(
            f"{inputs.teacher} knows {teacher.classes} classes, {inputs.data} has {len(source.classes)}; "
            "give a teacher of this data"
        )
    if inputs.cache is None:
        return None, teacher
    started = time.perf_counter()
    cache = TeacherCache.open(inputs.cache, source=source, teacher=teacher)
    cache.require(ids)
    costs["open cache"] = time.perf_counter() - started
    costs["cache"] = float(cache.manifest["seconds"])
    return cache, teacher


def _count_views(asked: int, available: int, cache: TeacherCache | None) -> int:
    most = available if cache is None else cache.n_views
    if asked > most:
        held = f"the data has {available}" if cache is None else f"the cache holds {most} (of {available})"
        raise UsageError(
            f"--views is {asked}, but {held}; lower it" + ("" if cache is None else " or cache more views")
        )
    return asked or most
