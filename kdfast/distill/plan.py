"""From what the user asked for to everything a run needs, opened and checked before the first step."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kdfast
from kdfast.data.loaders import Loader, make_loader
from kdfast.data.readers.registry import Source, normalization_of, open_source
from kdfast.data.subset import Subset, check_subset_file, read_subset
from kdfast.data.views import Normalization
from kdfast.distill.batches import Batches
from kdfast.distill.config import RunConfig
from kdfast.distill.distributed import Ranks
from kdfast.distill.schedule import parse_alpha
from kdfast.distill.targets import Targets
from kdfast.distill.teacher_targets import TeacherSide
from kdfast.errors import CheckpointError, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import load_model
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class Inputs:
    """The files of a run.

    Attributes:
        data: A source of data, see `kdfast.data.readers.registry`.
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
        facts: What else is worth writing down: paths, device, versions.
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
    facts: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What the run would do: settings, sizes, inputs."""
        per_epoch = self.batches().per_epoch
        return {
            **self.identity,
            **self.facts,
            "samples": len(self.ids),
            "of": len(self.source.train),
            "steps": per_epoch * self.config.epochs,
            "images": len(self.ids) * self.config.epochs,
        }

    def batches(self) -> Batches:
        """The run's seeded batches."""
        return Batches(
            self.ids,
            self.loader,
            self.source.views,
            n_views=self.config.views,
            view_seed=self.config.view_seed or 0,
            targets=self.targets,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            device=self.device,
            ranks=self.ranks,
        )


def prepare(inputs: Inputs, settings: Mapping[str, Any], *, alpha: str, device: torch.device) -> Plan:
    """Open and check everything a run needs; write nothing.

    Args:
        inputs: The files.
        settings: Fields of `RunConfig` other than alpha. `views` 0 means all the cache holds, or all there are;
            `view_seed` None the cache's, or 0.
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
    if inputs.subset is not None:
        check_subset_file(inputs.subset)
    started = time.perf_counter()
    source = open_source(inputs.data, size=inputs.size)
    subset = _subset(inputs.subset, source, config.batch_size)
    ranks.check(len(subset.ids), config.batch_size)
    check_student(config, len(subset.ids), source, ranks)
    config = dataclasses.replace(config, alpha=parse_alpha(alpha, len(subset.ids) / len(source.train)))
    costs = {"open data": time.perf_counter() - started}
    if subset.provenance and "seconds" in subset.provenance:
        costs["prune"] = float(subset.provenance["seconds"])
    side = TeacherSide() if config.alpha == 0 else _teacher_side(inputs, source, subset.ids, costs)
    opened = Opened(source, make_loader(source.train, inputs.loader, device), normalization_of(source.train), side)
    return assemble(
        opened, config, subset.ids, device=device, ranks=ranks, facts=dataclasses.asdict(inputs), costs=costs
    )


@dataclass(frozen=True)
class Opened:
    """What runs on the same data can share: opened once, it serves any number of plans.

    Attributes:
        source: The data.
        loader: Yields the images of its training split.
        normalization: The student's input statistics.
        side: The teacher's side.
    """

    source: Source
    loader: Loader
    normalization: Normalization
    side: TeacherSide


def assemble(
    opened: Opened,
    config: RunConfig,
    ids: NDArray[np.int64],
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    facts: Mapping[str, Any] | None = None,
    costs: Mapping[str, float] | None = None,
) -> Plan:
    """Plan a run on what is open already.

    Args:
        opened: The data and the teacher; the latter is used as it is, whatever alpha is.
        config: The settings; `views` and `view_seed` are resolved as `prepare` says.
        ids: int64 (n,), the kept samples.
        device: Where to train.
        ranks: This process among those of the run; by default it is alone.
        facts: More to write down.
        costs: Seconds of the stages before.

    Returns:
        The plan.

    Raises:
        UsageError, CacheMismatch: If there are not as many views as asked for.
    """
    source, side, ranks = opened.source, opened.side, ranks or Ranks()
    config = side.resolve_views(config, source.views.count)
    targets = side.targets(source, ids, config, device)
    return Plan(
        config=config,
        source=source,
        ids=ids,
        loader=opened.loader,
        targets=targets,
        normalization=opened.normalization,
        device=device,
        ranks=ranks,
        identity={
            **config.to_dict(),
            "data": source.fingerprint,
            "subset": hashlib.sha256(np.sort(ids).tobytes()).hexdigest(),
            "augmentation": source.views.to_dict(),
            "normalization": dataclasses.asdict(opened.normalization),
            "targets": None if targets is None else targets.name,
            "teacher": side.identity(),
            "processes": ranks.world,
        },
        facts={
            **(facts or {}),
            "loader": opened.loader.name,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "kdfast": kdfast.__version__,
            "torch": torch.__version__,
        },
        costs={**(costs or {}), "compile loader": getattr(opened.loader, "compile_seconds", 0.0)},
    )


def _subset(path: str | None, source: Source, batch_size: int) -> Subset:
    n = len(source.train)
    if path is not None:
        return read_subset(path, n=n, fingerprint=source.fingerprint, batch_size=batch_size)
    if n < batch_size:
        raise UsageError(f"--batch-size {batch_size} is larger than the {n} training samples; lower it")
    return Subset(ids=np.arange(n, dtype=np.int64), provenance=None, path=None)


def check_student(config: RunConfig, samples: int, source: Source, ranks: Ranks) -> None:
    """Make sure that there is such a network, and that it can take the last batch of an epoch.

    Batch norm over one value per channel has no variance, which matters where that batch is one sample.

    Raises:
        UsageError: If it cannot.
    """
    net = build_net(config.student, len(source.classes))
    last = samples % config.batch_size or config.batch_size
    if last // ranks.world > 1:
        return
    try:
        net.train()(torch.zeros(1, 3, *source.views.size))
    except ValueError as error:
        raise UsageError(
            f"the last batch of an epoch leaves one of {samples} samples to a process, and the network cannot train on "
            f"one ({error}); choose another --batch-size than {config.batch_size}"
        ) from error


def _teacher_side(inputs: Inputs, source: Source, ids: NDArray[np.int64], costs: dict[str, float]) -> TeacherSide:
    if inputs.cache is None and inputs.teacher is None:
        raise UsageError("an --alpha above 0 needs --cache or --teacher; plain training is --alpha 0")
    teacher = None if inputs.teacher is None else load_model(inputs.teacher)
    if teacher is not None and teacher.classes != len(source.classes):
        raise CheckpointError(
            f"{inputs.teacher} knows {teacher.classes} classes, {inputs.data} has {len(source.classes)}; "
            "give a teacher of this data"
        )
    if inputs.cache is None:
        return TeacherSide(model=teacher)
    started = time.perf_counter()
    cache = TeacherCache.open(inputs.cache, source=source, teacher=teacher)
    cache.require(ids)
    costs["open cache"] = time.perf_counter() - started
    costs["cache"] = float(cache.manifest["seconds"])
    return TeacherSide(cache=cache)
