"""A teacher's cache: its logits on the views of the training samples, for lookup during training.

`build_cache` writes it, `TeacherCache` reads it. The folder holds `logits-<shard>.npy` [view, sample, class] (raw
logits, never softmax; or records of the k most probable classes [view, sample]; or the classifier's inputs [view,
sample, D], and its weight and bias in `classifier.npy` [class, D + 1]), `identity_logits.npy` [sample, class] and
`features.npy` [sample, D] in float32, `coverage.npy` if not all training samples are covered, `manifest.json` and
`timing.json`.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import ViewSpec, view_table
from kdfast.errors import CacheMismatch, ShapeError
from kdfast.files.arrays import map_read_only, read_npy
from kdfast.nets.checkpoint import Model
from kdfast.nets.head import LinearHead
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.teacher.checks import check_intact, check_match
from kdfast.teacher.manifest import (
    CLASSIFIER,
    COVERAGE,
    FEATURES,
    IDENTITY,
    IMPORTED,
    digest_ids,
    read_manifest,
    read_timing,
    shard_file,
)
from kdfast.teacher.plan import compute_accuracy
from kdfast.teacher.row_format import RowFormat


class TeacherCache:
    """An opened cache. Make one with `TeacherCache.open`.

    Attributes:
        path: The cache's folder.
        manifest: The cache's manifest, and the "seconds" that the build took.
        n_views: Views per sample.
        view_seed: Seed that selects the views (no effect with all views, or one).
        spec: The data's set of views.
        classes: Number of classes, C.
        coverage: Original indices of the covered samples, ascending, int64 (n,).
        dtype: dtype of the stored numbers, torch.float16 or torch.float32.
        top_k: The classes kept per view; None for all.
        head: Computes the logits, for a cache of the classifier's inputs; None if logits are stored.
        teacher_digest: Digest of the teacher's weights, or of the logits if they were imported.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.n_views: int = manifest["views"]["n_views"]
        self.view_seed: int = manifest["views"]["view_seed"]
        self.spec = ViewSpec.from_dict(manifest["views"]["spec"])
        self.classes: int = manifest["data"]["classes"]
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._rows = RowFormat.from_manifest(manifest)
        self.top_k = self._rows.top_k
        self.teacher_digest: str = manifest["teacher"]["digest"]
        self.coverage = self._read_coverage()
        self.head = self._read_head()
        self._covers_all: bool = manifest["coverage"]["whole"]
        self._per_shard: int = manifest["per_shard"]
        self._maps: dict[int, tuple[npt.NDArray[Any], Callable[[int], None]]] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        source: Source | None = None,
        teacher: Model | None = None,
        check_files: bool = True,
        check_views: bool = True,
    ) -> TeacherCache:
        """Open a cache; check that it is intact and matches the data and the teacher.

        Args:
            path: The cache's folder.
            source: The data to compare: its fingerprint, views and classes, and the accuracy of the cached logits on
                its labels. None: not compared.
            teacher: The teacher to compare. None: not compared.
            check_files: Compare the SHA-256 of every file.
            check_views: Compare the views too; not needed for what is computed from the unaugmented images alone.

        Raises:
            CacheMismatch: The cache is unfinished or damaged, or was made from other data, by another teacher, or with
                other views.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        check_match(folder, manifest, source, teacher, views=check_views)
        if check_files:
            check_intact(folder, manifest["files"])
        manifest |= {"seconds": read_timing(folder)["seconds"]}
        cache = cls(folder, manifest)
        if source is not None:
            top1 = compute_accuracy(map_read_only(cache.identity_logits()), source.train.labels[cache.coverage])
            if abs(top1 - manifest["train_top1"]) > 1e-9:
                raise CacheMismatch(
                    f"{folder}: the cached logits have an accuracy of {top1:.3f}%, the manifest records "
                    f"{manifest['train_top1']:.3f}%: the labels have changed or the cache is damaged; build it again"
                )
        return cache

    def __len__(self) -> int:
        return len(self.coverage)

    @property
    def row_bytes(self) -> int:
        """Bytes stored per view of a sample."""
        return self._rows.row_bytes

    @property
    def lookup_bytes(self) -> int:
        """Bytes per view of a sample in memory, as `lookup`, `lookup_rows` or `lookup_filled` returns it."""
        return self._rows.row_bytes if self.top_k is None else 4 * self.classes

    def check_covers(self, sample_ids: IntArray) -> None:
        """Check that the cache covers the samples.

        Raises:
            CacheMismatch: Samples are missing; the message says how many.
        """
        self._positions(np.asarray(sample_ids, dtype=np.int64))

    def translate_view_indices(
        self, sample_ids: IntArray, view_indices: IntArray, n_views: int, view_seed: int
    ) -> IntArray:
        """Translate a run's view indices to view indices of this cache.

        A cache of all views serves every run. A cache of V views serves runs of up to V views with the same view seed.
        Every cache serves runs of one view, the identity.

        Args:
            sample_ids: Original indices (n,).
            view_indices: Columns (n,) of the run's `view_table`.
            n_views: Views per sample that the run draws from.
            view_seed: Seed of the run's choice of views.

        Returns:
            View indices (n,) to pass to `lookup`.

        Raises:
            CacheMismatch: The cache lacks views of the run.
        """
        total = self.spec.count
        if self.n_views == total:
            if n_views == total:
                return np.asarray(view_indices, dtype=np.int64)
            table = view_table(self.spec, view_seed, sample_ids, n_views)
            return np.take_along_axis(table, np.asarray(view_indices, dtype=np.int64)[:, None], axis=1)[:, 0]
        same_choice = view_seed == self.view_seed or n_views == 1
        if n_views > self.n_views or not same_choice:
            raise CacheMismatch(
                f"{self.path} holds {self.n_views} of {total} views, chosen with view seed {self.view_seed}; the "
                f"run needs {n_views} with view seed {view_seed}: use at most {self.n_views} views and the same view "
                "seed, or build a cache of all views"
            )
        return np.asarray(view_indices, dtype=np.int64)

    def lookup(self, sample_ids: IntArray, view_indices: IntArray) -> Tensor:
        """Return the teacher's logits on one view of each sample.

        Rows are read in file order and their pages are released at once, so memory grows by the result only. Calls for
        many samples at a time are the most efficient.

        Args:
            sample_ids: Original indices (n,).
            view_indices: View indices (n,) in [0, n_views), from `translate_view_indices`.

        Returns:
            Logits (n, classes) in the cache's dtype, or float32 if they are computed from features; on the CPU.

        Raises:
            CacheMismatch: The cache does not cover all samples, or does not hold all classes.
            ShapeError: The view indices have the wrong shape or are out of range.
        """
        rows = self.lookup_rows(sample_ids, view_indices)
        return rows if self.head is None else self.head.logits(rows)

    def lookup_rows(self, sample_ids: IntArray, view_indices: IntArray) -> Tensor:
        """Like `lookup`, but of a cache of features return these, (n, D) in the cache's dtype, for `head.logits`."""
        if self.top_k is not None:
            raise CacheMismatch(
                f"{self.path} holds the {self.top_k.k} most probable of {self.classes} classes of each view, but "
                "this use requires all: build a cache of all classes (`top_k` 0), or of features (`kind`)"
            )
        rows = torch.empty((len(sample_ids), *self._rows.shape), dtype=self.dtype)
        self._read(sample_ids, view_indices, rows.numpy())
        return rows

    def lookup_top_k(
        self, sample_ids: IntArray, view_indices: IntArray, temperature: float | None = None
    ) -> TopKTeacher:
        """Like `lookup`, for a cache of the most probable classes.

        Args:
            sample_ids: Original indices (n,).
            view_indices: View indices (n,).
            temperature: The temperature of the loss; None: the only one of the cache.

        Raises:
            CacheMismatch: The cache does not cover all samples, holds all classes, or is not for this temperature.
            ShapeError: The view indices have the wrong shape or are out of range.
        """
        if self.top_k is None:
            raise CacheMismatch(f"{self.path} holds all classes: call `lookup`")
        column = self.top_k.column(temperature, self.path)
        rows = np.empty(len(sample_ids), self._rows.element)
        self._read(sample_ids, view_indices, rows)
        return self._rows.unpack(rows, column)

    def lookup_filled(self, sample_ids: IntArray, view_indices: IntArray, temperature: float | None = None) -> Tensor:
        """Like `lookup_top_k`, but return logits of all classes.

        The kept classes, and the mass of the others together, are those of the view. The others share it as they do in
        the unaugmented image, whose logits the cache holds for all classes.

        Returns:
            float32 (n, classes), for a loss at this temperature.
        """
        teacher = self.lookup_top_k(sample_ids, view_indices, temperature)
        assert self.top_k is not None, "lookup_top_k raises then"
        if temperature is None:
            (temperature,) = self.top_k.temperatures
        positions = self._positions(np.asarray(sample_ids, dtype=np.int64))
        order = np.argsort(positions)
        whole, madvise = self._identity
        like = np.empty((len(positions), self.classes), np.float32)
        like[order] = whole[positions[order]]
        madvise(mmap.MADV_DONTNEED)
        return teacher.to_logits(torch.from_numpy(like), temperature)

    def _read(self, sample_ids: IntArray, view_indices: IntArray, target: npt.NDArray[Any]) -> None:
        """Fill `target` with the stored rows."""
        ids, indices = np.asarray(sample_ids, dtype=np.int64), np.asarray(view_indices, dtype=np.int64)
        if indices.shape != ids.shape or ids.ndim != 1:
            raise ShapeError(f"{ids.shape} sample ids and {indices.shape} view indices: pass one per sample")
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.n_views:
            raise ShapeError(
                f"view indices from {indices.min()} to {indices.max()}: the cache has 0 to {self.n_views - 1}"
            )
        shards, local = np.divmod(self._positions(ids), self._per_shard)
        sizes = np.minimum(self._per_shard, len(self.coverage) - shards * self._per_shard)
        rows = indices * sizes + local
        # A shard never has more rows than this, so the key sorts by shard, then by row.
        order = np.argsort(shards * (self.n_views * self._per_shard) + rows)
        starts = np.flatnonzero(np.diff(shards[order], prepend=-1))
        for begin, end in zip(starts, np.append(starts, len(order))[1:], strict=True):
            piece = order[begin:end]
            logits, madvise = self._map(int(shards[piece[0]]))
            target[piece] = logits[rows[piece]]
            madvise(mmap.MADV_DONTNEED)

    @property
    def is_imported(self) -> bool:
        """Whether another program computed the logits."""
        return bool(self.manifest["teacher"]["net"] == IMPORTED)

    @property
    def has_features(self) -> bool:
        """Whether the cache holds features; imported logits may come without."""
        return bool(self.manifest["features"])

    def features(self) -> npt.NDArray[np.float32]:
        """Return the classifier's inputs for the identity view, (n, D) in the order of `coverage`, memory-mapped.

        Raises:
            CacheMismatch: The logits were imported without features.
        """
        if not self.has_features:
            raise CacheMismatch(
                f"{self.path} holds imported logits without features, which this use requires: import them again, "
                "with the features"
            )
        return self._load_array(FEATURES, (len(self), self.manifest["features"]), np.float32)

    def identity_logits(self) -> npt.NDArray[np.float32]:
        """Return the identity view's logits in float32, (n, classes) in the order of `coverage`, memory-mapped."""
        return self._load_array(IDENTITY, (len(self), self.classes), np.float32)

    def _positions(self, ids: IntArray) -> IntArray:
        """Return the positions of the samples in `coverage`."""
        if self._covers_all:
            covered = (ids >= 0) & (ids < len(self.coverage))
            positions = ids
        else:
            positions = np.searchsorted(self.coverage, ids).clip(max=len(self.coverage) - 1)
            covered = self.coverage[positions] == ids
        if not covered.all():
            missing = np.unique(ids[~covered])
            raise CacheMismatch(
                f"{self.path} lacks {len(missing)} of the samples (for example {missing[0]}); it covers "
                f"{len(self.coverage)} of {self.manifest['data']['samples']}: build a cache on these samples or on all"
            )
        return positions

    @functools.cached_property
    def _identity(self) -> tuple[npt.NDArray[np.float32], Callable[[int], None]]:
        """The identity view's logits, and the function that advises the kernel on their pages."""
        return self._map_file(IDENTITY, (len(self), self.classes), np.float32)

    def _map(self, shard: int) -> tuple[npt.NDArray[Any], Callable[[int], None]]:
        """Return a shard's rows (n_views * n, ...), and the function that advises the kernel on their pages."""
        if shard not in self._maps:
            size = min(self._per_shard, len(self.coverage) - shard * self._per_shard)
            shape = (self.n_views, size, *self._rows.shape)
            array, madvise = self._map_file(shard_file(shard), shape, self._rows.element)
            self._maps[shard] = (array.reshape(-1, *self._rows.shape), madvise)
        return self._maps[shard]

    def _map_file(
        self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> tuple[npt.NDArray[Any], Callable[[int], None]]:
        """Return an array's mapped pages, and the function that advises the kernel on them."""
        array = self._load_array(name, shape, dtype, "r")
        return array, cast(mmap.mmap, array.base).madvise

    def _read_coverage(self) -> IntArray:
        info = self.manifest["coverage"]
        if info["whole"]:
            return np.arange(info["samples"], dtype=np.int64)
        coverage: IntArray = np.array(self._load_array(COVERAGE, (info["samples"],), np.int64))
        if digest_ids(coverage) != info["digest"]:
            raise CacheMismatch(f"{self.path / COVERAGE} does not match the manifest: build the cache again")
        return coverage

    def _read_head(self) -> LinearHead | None:
        if not self._rows.features:
            return None
        return LinearHead.from_array(
            self._load_array(CLASSIFIER, (self.classes, self._rows.features + 1), np.float32, "r")
        )

    def _load_array(
        self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike, mode: Literal["r", "c"] = "c"
    ) -> npt.NDArray[Any]:
        # Copy on write ("c"): callers may wrap the array in a tensor, which must be writable; the file stays as is.
        path, advice = self.path / name, "build the cache again"
        return read_npy(path, shape=shape, dtype=dtype, mmap_mode=mode, error=CacheMismatch, advice=advice)
