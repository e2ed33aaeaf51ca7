"""Load a teacher, cache its outputs, and evaluate models."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy.typing as npt
from torch import nn

from kdfast.api.data import as_integer, check_opened
from kdfast.data.source import Source, compute_normalization
from kdfast.data.views import Normalization
from kdfast.device import resolve_device
from kdfast.errors import DataWarning, UsageError
from kdfast.nets.checkpoint import Model, load_model
from kdfast.nets.fit import check_fit
from kdfast.nets.outputs import adapt, unchanged
from kdfast.progress import Progress
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.evaluate import evaluate_in_detail
from kdfast.teacher.plan import DEFAULT_TEMPERATURE, default_top_k, default_views
from kdfast.teacher.row_format import TopK

ModelLike: TypeAlias = Model | nn.Module | str | os.PathLike[str]


def load_teacher(
    teacher: ModelLike,
    data: Source | None = None,
    *,
    normalization: Normalization | None = None,
    teacher_net: str | None = None,
) -> Model:
    """Return a trained network with its classes and the normalization of its input.

    Args:
        teacher: A file that kdfast wrote, such as T.pt or the student.pt of a run; or a module that takes normalized
            images `(B, 3, H, W)` and returns logits `(B, C)`, or an object with `logits`. The module itself is put into
            evaluation mode, and returns its logits alone from then on.
        data: The data it was trained on. A module needs it for its classes; a file is compared with it if given.
        normalization: Of the input of a module; None: mean and standard deviation of the training images, with a
            `DataWarning`.
        teacher_net: The network that a file must hold, as for `kdfast.nets.build_net`; needed for one of your own code.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The file is damaged, or the network does not fit the data.
        UsageError: A module comes without `data`, or a file with a `normalization` of its own.
    """
    if isinstance(teacher, nn.Module):
        if data is None:
            raise UsageError("`teacher` is a module, which has no class names: pass `data` too")
        name = f"{type(teacher).__module__}:{type(teacher).__qualname__}"
        spec = normalization
        if spec is None:
            spec = compute_normalization(data.train)
            warnings.warn(
                "`normalization` is not given, so the module gets images normalized with the mean and standard "
                "deviation of these training images: pass `normalization` to load_teacher if it was trained otherwise",
                DataWarning,
                stacklevel=2,
            )
        model = Model(adapt(teacher).eval(), name, len(data.classes), data.classes, spec)
    elif normalization is not None:
        raise UsageError("`normalization` is for modules, a file has its own: omit it")
    else:
        model = teacher if isinstance(teacher, Model) else load_model(teacher, net=teacher_net)
    if data is not None:
        check_fit(model, data, str(teacher) if isinstance(teacher, (str, os.PathLike)) else "`teacher`")
    return model


def cache(
    data: Source,
    teacher: ModelLike,
    out: str | os.PathLike[str],
    *,
    ids: npt.ArrayLike | None = None,
    views: int | None = None,
    view_seed: int = 0,
    top_k: TopK | int | None = None,
    kind: Literal["logits", "features"] = "logits",
    precision: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    progress: Progress | None = None,
) -> TeacherCache:
    """Run a teacher on views of the training samples, and keep its logits and features. The same call resumes.

    Args:
        data: The data.
        teacher: See `load_teacher`.
        out: The cache's folder; created if missing.
        ids: Indices of the samples to cover; None for the whole training split.
        views: Augmentation views per sample; 0 for all that exist (162 for images padded by 4 and mirrored). None: all,
            but 50 of random crops of images of at least 64 pixels.
        view_seed: Seed that chooses the views.
        top_k: Keep only the most probable classes of each view; a number stands for the temperature 4, and 0 keeps all.
            None: all, but 10 of random crops of images of at least 64 pixels and more than 21 classes.
        kind: "features" stores the inputs of the teacher's last linear layer, from which the logits of all classes are
            computed when they are looked up.
        precision: Precision of the network on views other than the unaugmented image.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: Called with (images done, images in total, note).

    Returns:
        The opened cache.

    Raises:
        CacheMismatch: The folder holds another cache.
        CheckpointError, DataError, OutputError, SubsetError, UsageError: As for `kdfast.teacher.build.build_cache`.
    """
    check_opened(data)
    model = load_teacher(teacher, data)
    place = resolve_device(device)
    spec, seed = data.view_spec, as_integer("view_seed", view_seed)
    n_views = default_views(spec) if views is None else as_integer("views", views) or spec.count
    if top_k is None and kind == "logits":
        top_k = default_top_k(spec, model.classes)
    if not isinstance(top_k, TopK):
        count = as_integer("top_k", top_k or 0)
        top_k = TopK(count, DEFAULT_TEMPERATURE) if count else None
    build_cache(
        data, model, out, ids=ids, n_views=n_views, view_seed=seed, top_k=top_k, kind=kind, precision=precision,
        device=place, progress=progress,
    )  # fmt: skip
    return TeacherCache.open(Path(out), source=data, teacher=model, check_files=False)


def evaluate(
    model: ModelLike, data: Source, *, teacher: ModelLike | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Evaluate a network on the test split.

    Args:
        model: See `load_teacher`. A module moves to the device, and is otherwise left as it is, also in training.
        data: The data.
        teacher: A network to compare the predictions with, likewise; or None.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns:
        `top1` and `top5` in percent, `loss` in nats, `per_class`, `calibration` and, with a teacher, `agreement`: see
        `kdfast.teacher.evaluate.evaluate_in_detail`.

    Raises:
        CheckpointError: A file is damaged, or a network does not fit the data.
    """
    check_opened(data)
    place = resolve_device(device)
    with unchanged(*(given for given in (model, teacher) if isinstance(given, nn.Module))):
        other = None if teacher is None else load_teacher(teacher, data)
        return evaluate_in_detail(
            load_teacher(model, data), data.test, teacher=other, device=place, view_spec=data.view_spec
        )
