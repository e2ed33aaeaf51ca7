"""Make a cache of logits that another program computed, in two passes over them: the first checks, the second writes.

Nothing is written before all rows are checked, and neither pass holds more than a block of a file in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.errors import CacheMismatch, DataError, DataWarning, UsageError
from kdfast.files import FolderLock, atomic_write, check_writable, make_subfolder, sha256_file
from kdfast.files.space import check_space
from kdfast.progress import Progress
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.manifest import BUILDING, FEATURES, IDENTITY, IMPORTED, MANIFEST, shard_file
from kdfast.teacher.plan import check_cache_folder, delete_cache, make_plan, samples_per_shard, write_or_check_plan
from kdfast.teacher.row_format import RowFormat
from kdfast.teacher.writing.convert import Conversion
from kdfast.teacher.writing.finish import reuse_finished, seal_cache
from kdfast.teacher.writing.rows import Rows, RowSource, blocks, open_rows

Kind = Literal["logits", "probabilities", "log-probabilities"]

_DTYPES = ("float16", "float32")


def teacher_outputs(
    logits: RowSource,
    data: Source | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    features: RowSource | None = None,
    kind: Kind | None = None,
    temperature: float = 1.0,
    view_seed: int = 0,
    dtype: str = "float16",
    key: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> TeacherCache:
    """Make a cache of the outputs of a network that kdfast does not have, and open it.

    Args:
        logits: The outputs on the training split: float (N, C) on the images as they are, or (N, V, C) on the V views
            that `kdfast.data.views.view_table` gives with `view_seed`, of which one is the image as it is. An array, a
            tensor, or the path of a .npy, .npz, .pt or .safetensors file, which is read a block at a time.
        data: The data, or its path. Row i is its training sample i, and column c its class c.
        out: The cache's folder; created if missing.
        features: The inputs of the network's last layer on the images as they are, float (N, D), likewise. None: the
            cache has none, and methods that need features refuse it.
        kind: "logits", "probabilities" or "log-probabilities" (of all classes). A probability that was rounded to 0
            counts as the smallest positive number of its dtype. None: logits, unless they look like probabilities.
        temperature: What the logits were divided by before they were stored, or before the softmax.
        view_seed: Seed that chose the views.
        dtype: dtype of the stored logits, "float16" or "float32".
        key: Name of the logits in a file of several arrays. None: "logits", or the only array.
        force: Replace another cache in the folder, once the outputs are checked.
        progress: Called with (samples done, samples in total, note).

    Returns:
        The cache. Its manifest has the network "imported", without weights.

    Raises:
        UsageError: An option is wrong, or a file holds several arrays and no `key` chooses one.
        DataError: A file is damaged, or has other rows than the data has samples, or columns than it has classes; or
            values are not finite or not of this kind (the message names the row).
        CacheMismatch: The folder holds another cache.
        OutputError: The folder cannot be written, or holds something else.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"`dtype` is {dtype!r}: pass one of {', '.join(_DTYPES)}")
    check_cache_folder(Path(out))
    source = data if isinstance(data, Source) else open_source(data)
    outputs = Outputs.open(logits, source, kind, temperature, dtype, key)
    held = None if features is None else open_rows(features, what="features")
    if held is not None:
        _check_features(held, len(source.train))
    facts = outputs.check(held, progress)
    values = outputs.rows.shape[-1] * outputs.n_views
    check_space(
        out, len(source.train) * (values * outputs.dtype.itemsize + 4 * (held.shape[1] if held else 0)), "the cache"
    )
    if force:
        delete_cache(Path(out))
    plan = _make_plan(outputs, source, facts, held, view_seed)
    folder = check_writable(out)
    if (folder / MANIFEST).exists():
        reuse_finished(folder, plan)
    else:
        building = make_subfolder(folder, BUILDING)
        write_or_check_plan(folder, plan)
        with FolderLock(building):
            _write(outputs, held, folder, plan, facts, progress)
        shutil.rmtree(building)
    return TeacherCache.open(folder, source=source, check_files=False)


@dataclass(frozen=True)
class OutputFacts:
    """What the first pass found.

    Attributes:
        digest: SHA-256 of the logits.
        features: SHA-256 of the features, or None.
        train_top1: Percent of the samples whose largest logit is that of their label.
    """

    digest: str
    features: str | None
    train_top1: float


@dataclass(frozen=True)
class Outputs:
    """The outputs of a network, and how to read them.

    Attributes:
        rows: The stored values, (N, C) or (N, V, C).
        convert: Makes logits of them.
        labels: int64 (N,).
        identity: Column of the view that is the image as it is.
        dtype: dtype of the stored logits.
        what: The file or argument, for messages.
    """

    rows: Rows
    convert: Conversion
    labels: IntArray
    identity: int
    dtype: np.dtype[Any]
    what: str

    @classmethod
    def open(
        cls, logits: RowSource, source: Source, kind: str | None, temperature: float, dtype: str, key: str | None
    ) -> Outputs:
        """Open the outputs and compare their shape with the data; arguments and errors as for `teacher_outputs`."""
        what = str(logits) if isinstance(logits, (str, os.PathLike)) else "`logits`"
        rows = open_rows(logits, what="logits", key=key)
        _check_shape(rows.shape, source, what)
        views = rows.shape[1] if len(rows.shape) == 3 else 1
        # With all views, a view's column is its id; else the image as it is comes first.
        identity = source.view_spec.identity if views == source.view_spec.count else 0
        convert = Conversion(kind, temperature, rows.bits, what)
        return cls(rows, convert, source.train.labels, identity, np.dtype(dtype), what)

    @property
    def n_views(self) -> int:
        """Views per sample."""
        return self.rows.shape[1] if len(self.rows.shape) == 3 else 1

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.rows.shape[-1]

    def read(self, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Return logits (n, V, C) of samples, which follow those of the call before, or start at 0."""
        return self.convert(self.rows.read(begin, end).reshape(end - begin, self.n_views, self.classes), begin)

    def check(self, features: Rows | None, progress: Progress | None = None) -> OutputFacts:
        """Read everything once, and warn if the logits fit the labels no better than chance.

        Raises:
            DataError: A value is not finite, not of the kind, or too large for the dtype.
        """
        digest, correct, n = hashlib.sha256(), 0, len(self.labels)
        limit = float(np.finfo(self.dtype).max)
        for begin, raw in blocks(self.rows):
            logits = self.convert(raw.reshape(len(raw), self.n_views, self.classes), begin)
            largest = np.abs(logits).max((1, 2))
            if largest.max() > limit:
                raise DataError(
                    f"{self.what}: the logits of row {begin + int(largest.argmax())} reach {largest.max():.4g}, above "
                    f"{limit:.4g}, the largest {self.dtype}: pass `dtype` float32"
                )
            digest.update(logits.astype("<f4").data)
            predicted = logits[:, self.identity].argmax(1)
            correct += int(np.count_nonzero(predicted == self.labels[begin : begin + len(raw)]))
            if progress is not None:
                progress(begin + len(raw), n, "checking")
        self._compare_with_chance(correct)
        return OutputFacts(digest.hexdigest(), _digest_features(features), 100 * float(correct) / n)

    def _compare_with_chance(self, correct: int) -> None:
        n = len(self.labels)
        chance = np.bincount(self.labels).max() / n
        if correct <= n * chance + 3 * np.sqrt(n * chance * (1 - chance)):
            warnings.warn(
                f"{self.what}: the largest logit is that of the label for {100 * correct / n:.2f}% of the samples, no "
                f"more than chance ({100 * chance:.2f}%): check that row i is sample i of this data, unshuffled, and "
                "column c its class c",
                DataWarning,
                stacklevel=4,
            )


def _check_shape(shape: tuple[int, ...], source: Source, what: str) -> None:
    n, classes, views = len(source.train), len(source.classes), source.view_spec.count
    wanted = f"the data has {n} training samples and {classes} classes: pass ({n}, {classes}) or ({n}, V, {classes})"
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(f"{what} has shape {shape}, and {wanted}")
    if (shape[0], shape[-1]) != (n, classes):
        hint = "the rows are as many as the test split's; " if shape[0] == len(source.test) != n else ""
        raise CacheMismatch(f"{what} has shape {shape}; {hint}{wanted}")
    if len(shape) == 3 and shape[1] > views:
        raise DataError(f"{what} has {shape[1]} views of each sample, and this data has {views}: pass at most {views}")


def _check_features(rows: Rows, n: int) -> None:
    if len(rows.shape) != 2 or rows.shape[0] != n or not rows.shape[1]:
        raise DataError(f"`features` have shape {rows.shape}, and the data has {n} training samples: pass ({n}, D)")


def _digest_features(rows: Rows | None) -> str | None:
    if rows is None:
        return None
    digest = hashlib.sha256(json.dumps(rows.shape).encode())
    for begin, raw in blocks(rows):
        with np.errstate(over="ignore"):
            values = raw.astype("<f4")
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise DataError(
                f"`features` of row {begin + bad[0]} are not finite: correct the network that computed them"
            )
        digest.update(values.data)
    return digest.hexdigest()


def _make_plan(
    outputs: Outputs, source: Source, facts: OutputFacts, features: Rows | None, view_seed: int
) -> dict[str, Any]:
    teacher = {
        "net": IMPORTED,
        "digest": facts.digest,
        "kind": outputs.convert.kind,
        "temperature": outputs.convert.temperature,
        "features_digest": facts.features,
    }
    rows = RowFormat(outputs.classes, outputs.dtype)
    coverage = np.arange(len(source.train), dtype=np.int64)
    plan = make_plan(source, teacher, coverage, outputs.n_views, view_seed)
    plan |= {"dtype": outputs.dtype.name, "precision": "float32", "top_k": None}
    return plan | {
        "per_shard": samples_per_shard(outputs.n_views, rows.row_bytes),
        "features": 0 if features is None else features.shape[1],
    }


def _write(
    outputs: Outputs,
    features: Rows | None,
    folder: Path,
    plan: dict[str, Any],
    facts: OutputFacts,
    progress: Progress | None,
) -> None:
    """Write all arrays, and the manifest last."""
    started = time.perf_counter()
    n, names = len(outputs.labels), []
    with atomic_write(folder / IDENTITY) as identity:
        _write_header(identity, (n, outputs.classes))
        for shard, begin in enumerate(range(0, n, plan["per_shard"])):
            end = min(begin + plan["per_shard"], n)
            stored = np.empty((outputs.n_views, end - begin, outputs.classes), outputs.dtype)
            step = max(1, (8 << 20) // (8 * outputs.n_views * outputs.classes))
            for first in range(begin, end, step):
                logits = outputs.read(first, min(first + step, end))
                stored[:, first - begin : first - begin + len(logits)] = logits.swapaxes(0, 1)
                identity.write(np.ascontiguousarray(logits[:, outputs.identity], "<f4").data)
            names.append(shard_file(shard))
            with atomic_write(folder / names[-1]) as file:
                np.save(file, stored)
            if progress is not None:
                progress(end, n, "writing")
    names.append(IDENTITY)
    if features is not None:
        with atomic_write(folder / FEATURES) as file:
            _write_header(file, (n, features.shape[1]))
            for _, raw in blocks(features):
                file.write(raw.astype("<f4").data)
        names.append(FEATURES)
    digests = {name: sha256_file(folder / name) for name in names}
    results = {"train_top1": facts.train_top1, "test_top1": None}
    seconds = time.perf_counter() - started
    seal_cache(folder, plan, results, digests, seconds=seconds, images=n * outputs.n_views)


def _write_header(file: Any, shape: tuple[int, int]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
