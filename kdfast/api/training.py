"""Distill a teacher into a student."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
from torch import nn

from kdfast.api.data import as_integer, check_opened, folder_of
from kdfast.api.teacher import ModelLike, load_teacher
from kdfast.data.arrays import as_array
from kdfast.data.augment.presets import augment_source
from kdfast.data.source import Source, check_epoch_ids
from kdfast.data.subset import Subset, open_subset
from kdfast.data.subset.ids import mask_to_ids
from kdfast.device import resolve_device, resolve_precision
from kdfast.distillation.config import Execution, RunConfig
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.inputs import open_targets, plan_opened
from kdfast.distillation.losses.settings import TermSetting
from kdfast.distillation.plan import Plan
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.train import Monitoring, train
from kdfast.distributed.group import Distributed
from kdfast.errors import UsageError
from kdfast.nets.checkpoint import Model, load_model
from kdfast.teacher.cache import TeacherCache

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11

StrPath: TypeAlias = str | os.PathLike[str]


_INTEGERS = {"epochs", "batch_size", "views", "view_seed", "seed", "initial_epochs", "steps"}


class Settings(TypedDict, total=False):
    """Settings of a run: those of `kdfast.distillation.config.RunConfig`, with the same defaults."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    warmup_epochs: float
    temperature: float
    views: int
    view_seed: int | None
    precision: str
    seed: int
    ce: float | None
    terms: Sequence[TermSetting]
    taps: Sequence[tuple[str, str]]
    initial_epochs: int | None
    terms_warmup_epochs: float
    reshape_logits: bool
    optimizer: str
    label_smoothing: float
    ema: float
    clip: float
    mixup: float
    cutmix: float
    init: str | None
    steps: int | None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Its folder, with config.json, metrics.jsonl, result.json and student.pt.
        result: The content of result.json, such as `test_top1` in percent, `steps` and `seconds`; empty in processes
            of torchrun other than the main one.
    """

    folder: Path
    result: dict[str, Any]

    @property
    def student(self) -> Model:
        """The trained student, read from its file."""
        return load_model(self.folder / "student.pt")


def distill(
    data: Source,
    student: str | Callable[..., nn.Module],
    out: StrPath,
    *,
    subset: npt.ArrayLike | StrPath | None = None,
    cache: TeacherCache | StrPath | None = None,
    teacher: ModelLike | None = None,
    alpha: float | str = "auto",
    augment: str | None = None,
    loader: str = "auto",
    resume: str = "auto",
    device: str = "auto",
    monitoring: Monitoring | None = None,
    execution: Execution | None = None,
    **settings: Unpack[Settings],
) -> Run:
    """Train a student on a subset of the data, with a teacher or without. The same call resumes.

    The loss is (1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student), plus the weighted `terms`.

    Args:
        data: The data.
        student: Name of a network, see `kdfast.nets.build_net`; or a class or function of a module that takes the
            number of classes and returns a network.
        out: Folder of the run; created if missing.
        subset: The samples to keep: indices `(m,)`, a mask `(N,)`, or a subset file. None: the whole training split.
        cache: The teacher's cache.
        teacher: The teacher, to run during training where there is no cache, and for terms that read its activations;
            see `load_teacher`.
        alpha: Weight of the divergence from the teacher; `auto`: by the kept share, see
            `kdfast.distillation.losses.alpha`; 0: train without a teacher.
        augment: Augmentation in place of the data's own, see `kdfast.data.augment.presets.augment_source`.
        loader: `auto`, `ffcv` or `resident`.
        resume: `auto`, `never` or `overwrite`: what to do about a run in the folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        monitoring: Logging, checkpoints, trackers and callbacks, such as `Monitoring(on_epoch_end=function)`.
        execution: How the steps are computed.
        settings: The recipe; see `Settings`. `precision` may also be `auto`.

    Returns:
        The finished run.

    Raises:
        UsageError: Settings do not fit together or the data, or the folder holds another run.
        SubsetError, CacheMismatch, CheckpointError: An input is damaged or does not fit the others.
        DivergedError: The loss is not finite.
        Interrupted: After SIGTERM or Ctrl-C, with the state saved; the same call resumes.
    """
    plan = _plan(data, student, subset, cache, teacher, str(alpha), augment, loader, device, execution, settings)
    writes = plan.distributed.is_main
    with (
        plan.distributed.process_group(plan.device),
        RunFolder(out, plan.identity, metadata=plan.metadata, resume=resume, writes=writes) as folder,
    ):
        return Run(Path(out), train(plan, folder, monitoring))


def _plan(
    data: Source,
    student: str | Callable[..., nn.Module],
    subset: npt.ArrayLike | StrPath | None,
    cache: TeacherCache | StrPath | None,
    teacher: ModelLike | None,
    alpha: str,
    augment: str | None,
    loader: str,
    device: str,
    execution: Execution | None,
    settings: Settings,
) -> Plan:
    check_opened(data)
    started = time.perf_counter()
    distributed = Distributed.from_environment()
    place = distributed.local_device(resolve_device(device))
    config = RunConfig(student=_network_name(student), **_resolve(settings, place))
    source, views = augment_source(data, augment, config.views)
    kept = _read_subset(subset, source, config.batch_size)
    paths = {name: str(value) for name, value in (("subset", kept.path), ("data", data.path)) if value is not None}
    return plan_opened(
        source,
        kept,
        dataclasses.replace(config, views=views),
        lambda: _open_teacher(source, kept, cache, teacher),
        loader=loader,
        device=place,
        distributed=distributed,
        alpha=alpha,
        execution=execution,
        paths={**paths, "augment": augment},
        stage_seconds={"open data": time.perf_counter() - started},
    )


def _resolve(settings: Settings, device: Any) -> dict[str, Any]:
    resolved: dict[str, Any] = {
        name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()
    }
    for name in _INTEGERS & resolved.keys():
        if resolved[name] is not None:
            resolved[name] = as_integer(name, resolved[name])
    if resolved.get("steps") is not None and resolved.get("epochs") is not None:
        raise UsageError("`epochs` and `steps` both say how long to train: pass one of them")
    if resolved.get("epochs", 0) is None:
        del resolved["epochs"]
    resolved["precision"] = resolve_precision(settings.get("precision", "fp32"), device)
    return {**resolved, **{name: tuple(resolved[name]) for name in ("terms", "taps") if name in resolved}}


def _network_name(student: str | Callable[..., nn.Module]) -> str:
    """Return the name that builds the network again, in this run and when its file is opened."""
    if isinstance(student, str):
        return student
    module, name = getattr(student, "__module__", None), getattr(student, "__qualname__", "")
    if isinstance(student, nn.Module) or getattr(sys.modules.get(str(module)), name, None) is not student:
        raise UsageError(
            f"`student` is a {type(student).__name__} without a name to build it by: pass the name of a network, or a "
            "class or function at the top level of a module"
        )
    return f"{module}:{name}"


def _read_subset(subset: npt.ArrayLike | StrPath | None, source: Source, batch_size: int) -> Subset:
    n = len(source.train)
    if isinstance(subset, (str, os.PathLike)):
        return open_subset(subset, source, batch_size=batch_size)
    ids: npt.NDArray[Any] = (
        np.arange(n) if subset is None else as_array(subset, "`subset`", f"indices (m,), or a mask ({n},)")
    )
    if ids.dtype == np.bool_:
        ids = mask_to_ids(ids, "`subset`", n)
    ids = check_epoch_ids(ids, n, batch_size)
    if len(ids) < batch_size:
        raise UsageError(f"`batch_size` is {batch_size}, more than the {len(ids)} samples: lower it")
    return Subset(ids, None, None)


def _open_teacher(
    source: Source, subset: Subset, cache: TeacherCache | StrPath | None, teacher: ModelLike | None
) -> TeacherTargets:
    model = None if teacher is None else load_teacher(teacher, source)
    return open_targets(source, subset.ids, folder_of(cache), model)
