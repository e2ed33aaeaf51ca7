"""Score samples and select those to keep, from a teacher's cache, recorded dynamics or arrays."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kdfast.api.data import as_integer, check_opened, folder_of
from kdfast.api.teacher import ModelLike, load_teacher
from kdfast.data.arrays import as_array, as_values
from kdfast.data.readers.bare_labels import from_labels
from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import check_subset_path, write_subset
from kdfast.data.subset.ids import check_ids, check_range, mask_to_ids
from kdfast.device import resolve_device
from kdfast.distillation.config import LARGEST_SEED, check_integer
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import UsageError
from kdfast.nets.checkpoint import Model
from kdfast.progress import Progress
from kdfast.pruning.options import OptionValue, complete_options
from kdfast.pruning.own_scores.readings import choose_higher
from kdfast.pruning.request import PruneRequest
from kdfast.pruning.score_file import ScoreFile
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.scores.registry import get_score
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.writing.outputs import teacher_outputs

Data: TypeAlias = Source | npt.ArrayLike
Options: TypeAlias = Mapping[str, OptionValue]
StrPath: TypeAlias = str | os.PathLike[str]


def score(
    data: Data,
    method: str,
    *,
    cache: TeacherCache | StrPath | None = None,
    dynamics: Dynamics | StrPath | None = None,
    teacher: ModelLike | None = None,
    logits: npt.ArrayLike | None = None,
    features: npt.ArrayLike | None = None,
    options: Options | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> ScoreFile:
    """Compute one number per training sample; higher = harder.

    Args:
        data: The data; or labels, integers `(N,)`, for scores that need no images.
        method: A key of `kdfast.pruning.scores.registry.SCORES`; `kdfast score --help` lists them.
        cache: A teacher's cache.
        dynamics: Recorded training dynamics.
        teacher: A network, for scores that differentiate it.
        logits: A teacher's logits of the training samples, floats `(N, C)`, in place of `cache`.
        features: Inputs of the teacher's last layer, floats `(N, D)`; with `logits`.
        options: Options of the score; the others have their defaults.
        seed: Seed of the score's random draws.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: Called with (done, total, note) by scores that take long.

    Returns:
        The scores, float64 `(N,)`, as `scores`, with their provenance. `kdfast.write_scores` writes them.

    Raises:
        UsageError: The score or an option does not exist, or an input is missing; the message says how to get it.
        DataError, CacheMismatch, CheckpointError: An input is damaged or belongs to other data.
    """
    source, place = _as_source(data), str(resolve_device(device))
    completed = complete_options(method, get_score(method).options, dict(options or {}))
    with _cache_folder(source, cache, logits, features) as folder:
        sources = ScoreSources.open(
            source, cache=folder, dynamics=folder_of(dynamics), teacher=_network(teacher, source)
        )
        return sources.score(method, seed=_seed(seed), options=completed, device=place, progress=progress)


def prune(
    data: Data,
    fraction: float,
    *,
    method: str | None = None,
    scores: ScoreFile | npt.ArrayLike | StrPath | None = None,
    key: str | None = None,
    higher: str | None = None,
    rule: str | None = None,
    options: Options | None = None,
    score_options: Options | None = None,
    balance: str = "balanced",
    exclude: npt.ArrayLike | StrPath | None = None,
    seed: int = 0,
    cache: TeacherCache | StrPath | None = None,
    dynamics: Dynamics | StrPath | None = None,
    teacher: ModelLike | None = None,
    logits: npt.ArrayLike | None = None,
    features: npt.ArrayLike | None = None,
    out: StrPath | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> IntArray:
    """Select the training samples to keep.

    Args:
        data: The data; or labels, integers `(N,)`, for methods that need no images.
        fraction: Share to keep, above 0 and at most 1.
        method: A score, or a method that selects directly, such as `if-beta`; `kdfast prune --help` lists them. None:
            random, unless there are `scores`.
        scores: Scores to select by, or for such a method to rank by: those of `kdfast.score`, real numbers `(N,)`,
            higher = harder, or a file, also of another program.
        key: Which array of such a file to use; None: the only one.
        higher: What a high score means in such a file or in numbers, `hard` or `easy`; None: hard.
        rule: A key of `kdfast.pruning.rules.registry.RULES`; None: the one that the score was published with.
        options: Options of the rule, or of the method that selects directly.
        score_options: Options of the score.
        balance: `balanced`, `equal` or `unbalanced`, see `kdfast.pruning.rules.apply.select_subset`.
        exclude: Samples that must not be kept: indices `(k,)`, a mask `(N,)`, or a subset file; `fraction` stays the
            share of the whole training split. None: none.
        seed: Seed of scores, tie-breaks and random draws.
        cache: A teacher's cache.
        dynamics: Recorded training dynamics.
        teacher: A network, for scores that differentiate it.
        logits: A teacher's logits of the training samples, floats `(N, C)`, in place of `cache`.
        features: Inputs of the teacher's last layer, floats `(N, D)`; with `logits`.
        out: Subset file to write, idx.npy, with its provenance beside it; None: write nothing.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: Called with (done, total, note) by methods that take long.

    Returns:
        int64 `(m,)`, ascending indices into the training split.

    Raises:
        SubsetError: The fraction keeps no sample, leaves a class empty, or needs samples that are excluded.
        UsageError: A name or an option does not exist, or an input is missing; the message says how to get it.
        DataError, CacheMismatch, CheckpointError: An input is damaged or belongs to other data.
    """
    source, place = _as_source(data), str(resolve_device(device))
    if out is not None:
        check_subset_path(out)
    with _cache_folder(source, cache, logits, features) as folder:
        request = PruneRequest(
            fractions=(fraction.item() if isinstance(fraction, np.generic) else fraction,),
            method=method,
            **_scores(scores, source, key, higher),
            rule=rule,
            options=dict(options or {}),
            score_options=dict(score_options or {}),
            balance=balance,
            seed=_seed(seed),
            device=place,
            cache=folder,
            dynamics=folder_of(dynamics),
            teacher=_network(teacher, source),
            exclude=_excluded(exclude, source),
        )
        request.check()
        (selection,) = request.run(source, progress=progress)
    if out is not None:
        write_subset(out, selection.ids, selection.provenance)
    return selection.ids


def _as_source(data: Data) -> Source:
    if isinstance(data, (str, os.PathLike)):
        check_opened(data)
    return data if isinstance(data, Source) else from_labels(data)


@contextmanager
def _cache_folder(
    source: Source, cache: TeacherCache | StrPath | None, logits: npt.ArrayLike | None, features: npt.ArrayLike | None
) -> Iterator[Path | None]:
    """Yield the folder of the cache, or of a temporary one of the logits; None without both."""
    if logits is None:
        if features is not None:
            raise UsageError("`features` are given without `logits`: pass both")
        yield folder_of(cache)
        return
    if cache is not None:
        raise UsageError("`logits` take the place of `cache`: pass one of them")
    with tempfile.TemporaryDirectory(prefix="kdfast-") as folder:
        yield teacher_outputs(logits, source, Path(folder) / "cache", features=features, dtype="float32").path


def _seed(seed: int) -> int:
    value = as_integer("seed", seed)
    check_integer("seed", value, 0, LARGEST_SEED)
    return value


def _network(teacher: ModelLike | None, source: Source) -> Model | None:
    return None if teacher is None else load_teacher(teacher, source)


def _excluded(exclude: npt.ArrayLike | StrPath | None, source: Source) -> Path | IntArray | None:
    if exclude is None or isinstance(exclude, (str, os.PathLike)):
        return None if exclude is None else Path(exclude)
    n = len(source.train)
    ids: npt.NDArray[Any] = as_array(exclude, "`exclude`", f"indices (k,), or a mask ({n},)")
    if ids.dtype == np.bool_:
        return mask_to_ids(ids, "`exclude`", n)
    checked = check_ids(ids, "`exclude`", n)
    check_range(checked, "`exclude`", n)
    return checked


def _scores(
    scores: ScoreFile | npt.ArrayLike | StrPath | None, source: Source, key: str | None, higher: str | None
) -> dict[str, Any]:
    """Return the arguments of `PruneRequest` that say which scores to use."""
    if scores is None or isinstance(scores, (str, os.PathLike)):
        return {"scores": None if scores is None else Path(scores), "key": key, "higher": higher}
    if key is not None:
        raise UsageError("`key` chooses an array of a file, and `scores` is none: omit it")
    if isinstance(scores, ScoreFile):
        if higher is not None:
            raise UsageError("`scores` were computed by kdfast, so higher = harder: omit `higher`")
        return {"scores": scores}
    values = as_values(scores, len(source.train), "`scores`")
    if choose_higher(higher, "") == "easy":
        return {"scores": ScoreFile(-values, "own", source.fingerprint, parameters={"higher": "easy"})}
    return {"scores": ScoreFile(values, "own", source.fingerprint)}
