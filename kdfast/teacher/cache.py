"""A teacher's cache: its logits on every view of every sample, read at the speed of the training that uses them.

`build_cache` writes it, `TeacherCache` reads it. The folder holds `logits-<shard>.npy` [view, sample, class] (raw
logits, never softmax; or records of the k most probable classes [view, sample]), `identity_logits.npy` [sample, class]
and `features.npy` [sample, D] in float32, `coverage.npy` where not every training sample is covered, `manifest.json`
and `timing.json`.
"""

from __future__ import annotations

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
from kdfast.nets.checkpoint import Model
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.teacher import manifest as card
from kdfast.teacher.build import CacheBuild, build_cache
from kdfast.teacher.checks import require_match, require_sound
from kdfast.teacher.plan import train_accuracy
from kdfast.teacher.rows import Rows
from kdfast.teacher.verify import Verification, recompute

__all__ = ["CacheBuild", "TeacherCache", "Verification", "build_cache"]


class TeacherCache:
    """An opened cache. Make one with `TeacherCache.open`.

    Attributes:
        path: Its folder.
        manifest: Its manifest, with the "seconds" that the build took.
        n_views: Views per sample.
        view_seed: Seed of their choice (of no effect with all views, or one).
        spec: The views there are.
        classes: Width of the logits.
        coverage: Original indices of the covered samples, ascending, int64 (n,).
        dtype: Of the logits, torch.float16 or torch.float32.
        top_k: The classes kept of each view; None for all.
        teacher_digest: Digest of the teacher's weights.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.n_views: int = manifest["views"]["n_views"]
        self.view_seed: int = manifest["views"]["view_seed"]
        self.spec = ViewSpec.from_dict(manifest["views"]["spec"])
        self.classes: int = manifest["data"]["classes"]
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._rows = Rows.of_manifest(manifest)
        self.top_k = self._rows.top_k
        self.teacher_digest: str = manifest["teacher"]["digest"]
        self.coverage = self._read_coverage()
        self._whole: bool = manifest["coverage"]["whole"]
        self._per_shard: int = manifest["per_shard"]
        self._maps: dict[int, tuple[npt.NDArray[Any], Callable[[int], None]]] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        source: Source | None = None,
        fingerprint: str | None = None,
        views: ViewSpec | None = None,
        classes: int | None = None,
        teacher: Model | None = None,
        check_files: bool = True,
    ) -> TeacherCache:
        """Open a cache and make sure that it is whole and belongs to what it is to be used with.

        Args:
            path: The cache's folder.
            source: The data. Its fingerprint, views and classes are compared, and the accuracy of the cached logits on
                its labels with the one in the manifest.
            fingerprint: Fingerprint of the data, where there is no source at hand.
            views: The views of the data, likewise.
            classes: Number of classes of the data, likewise.
            teacher: The teacher that the cache must have been made by.
            check_files: Compare the SHA-256 of every file.

        Raises:
            CacheMismatch: The cache is unfinished or damaged, or was made from other data, by another teacher, or with
                other views.
        """
        folder = Path(path)
        manifest = card.read_manifest(folder)
        if source is not None:
            fingerprint, views, classes = source.fingerprint, source.views, len(source.classes)
        require_match(folder, manifest, fingerprint, views, classes, teacher)
        if check_files:
            require_sound(folder, manifest["files"])
        manifest |= {"seconds": card.read_sealed(folder / card.TIMING)["seconds"]}
        cache = cls(folder, manifest)
        if source is not None:
            found = train_accuracy(cache.identity_logits(), source.train.labels[cache.coverage])
            if abs(found - manifest["train_top1"]) > 1e-9:
                raise CacheMismatch(
                    f"{folder}: the cached logits are right on {found:.3f}% of the samples, the manifest says "
                    f"{manifest['train_top1']:.3f}%: the labels have changed or the cache is damaged; build it again"
                )
        return cache

    def __len__(self) -> int:
        return len(self.coverage)

    @property
    def row_bytes(self) -> int:
        """Size of what is stored of one view of one sample."""
        return self._rows.row_bytes

    def require(self, sample_ids: IntArray) -> None:
        """Make sure that samples are covered.

        Raises:
            CacheMismatch: Some are not; says how many, and what to do.
        """
        self._positions(np.asarray(sample_ids, dtype=np.int64))

    def slots_for(self, sample_ids: IntArray, slots: IntArray, n_views: int, view_seed: int) -> IntArray:
        """Translate a run's view slots into columns of this cache.

        A cache of all views serves every run; one of V views serves runs of up to V views with its own view seed; and
        every cache serves runs of one view, the identity.

        Args:
            sample_ids: Original indices (n,).
            slots: The run's slots (n,), columns of its `view_table`.
            n_views: Views per sample that the run draws from.
            view_seed: The run's seed of their choice.

        Returns:
            Columns (n,) to give to `lookup`.

        Raises:
            CacheMismatch: The cache lacks views of that run.
        """
        everything = self.spec.count
        if self.n_views == everything:
            if n_views == everything:
                return np.asarray(slots, dtype=np.int64)
            table = view_table(self.spec, view_seed, sample_ids, n_views)
            return np.take_along_axis(table, np.asarray(slots, dtype=np.int64)[:, None], axis=1)[:, 0]
        same_choice = view_seed == self.view_seed or n_views == 1
        if n_views > self.n_views or not same_choice:
            raise CacheMismatch(
                f"{self.path} holds {self.n_views} of {everything} views, chosen with view seed {self.view_seed}; the "
                f"run needs {n_views} with view seed {view_seed}: use at most {self.n_views} views and the same view "
                "seed, or build a cache of all views"
            )
        return np.asarray(slots, dtype=np.int64)

    def lookup(self, sample_ids: IntArray, slots: IntArray, out: Tensor | None = None) -> Tensor:
        """The teacher's logits on one view of each sample.

        Rows are read in the order of the files and their pages given back at once, so memory grows by the result only.
        Best called for many samples at a time.

        Args:
            sample_ids: Original indices (n,).
            slots: Columns (n,) in [0, n_views), from `slots_for`.
            out: Where to put the result; a CPU tensor (n, classes) of the cache's dtype.

        Returns:
            Logits (n, classes) in the cache's dtype, on the CPU; `out` if given.

        Raises:
            CacheMismatch: Samples that are not covered, or a cache that does not hold all classes.
            ShapeError: Slots or `out` do not fit.
        """
        if self.top_k is not None:
            raise CacheMismatch(
                f"{self.path} holds the {self.top_k.k} most probable of {self.classes} classes of each view, and all "
                "are needed: build a cache without --top-k"
            )
        result = self._result(len(sample_ids), out)
        self._read(sample_ids, slots, result.numpy())
        return result

    def lookup_top_k(self, sample_ids: IntArray, slots: IntArray) -> TopKTeacher:
        """As `lookup`, from a cache of the most probable classes.

        Raises:
            CacheMismatch: Samples that are not covered, or a cache that holds all classes.
            ShapeError: Slots do not fit.
        """
        if self.top_k is None:
            raise CacheMismatch(f"{self.path} holds all classes: use lookup")
        rows = np.empty(len(sample_ids), self._rows.element)
        self._read(sample_ids, slots, rows)
        return self._rows.unpack(rows)

    def _read(self, sample_ids: IntArray, slots: IntArray, target: npt.NDArray[Any]) -> None:
        """Fill `target` with the stored rows."""
        ids, columns = np.asarray(sample_ids, dtype=np.int64), np.asarray(slots, dtype=np.int64)
        if columns.shape != ids.shape or ids.ndim != 1:
            raise ShapeError(f"{ids.shape} sample ids and {columns.shape} slots: give one slot for each sample")
        if len(columns) and not 0 <= columns.min() <= columns.max() < self.n_views:
            raise ShapeError(
                f"slots from {columns.min()} to {columns.max()}: the cache has the slots 0 to {self.n_views - 1}"
            )
        shards, local = np.divmod(self._positions(ids), self._per_shard)
        sizes = np.minimum(self._per_shard, len(self.coverage) - shards * self._per_shard)
        rows = columns * sizes + local
        # A shard never has more rows than this, so the key sorts by shard, then by row.
        order = np.argsort(shards * (self.n_views * self._per_shard) + rows)
        starts = np.flatnonzero(np.diff(shards[order], prepend=-1))
        for begin, end in zip(starts, np.append(starts, len(order))[1:], strict=True):
            piece = order[begin:end]
            logits, madvise = self._map(int(shards[piece[0]]))
            target[piece] = logits[rows[piece]]
            madvise(mmap.MADV_DONTNEED)

    def features(self) -> npt.NDArray[np.float32]:
        """The classifier's inputs for the identity view, (n, D) in the order of `coverage`, memory-mapped."""
        return self._array(card.FEATURES)

    def identity_logits(self) -> npt.NDArray[np.float32]:
        """Logits of the identity view in float32, (n, classes) in the order of `coverage`, memory-mapped."""
        return self._array(card.IDENTITY)

    def verify(
        self,
        source: Source,
        model: Model,
        samples: int = 64,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Verification:
        """Recompute the teacher's logits on random views of random samples and compare.

        Args:
            source: The data.
            model: The teacher.
            samples: How many samples to draw, without repetition.
            seed: Seed of the draw.
            device: Where to compute.

        Raises:
            CacheMismatch: The cache was made by another teacher or from other data, or logits differ by more than
                rounding explains.
        """
        require_match(self.path, self.manifest, source.fingerprint, source.views, len(source.classes), model)
        draw = np.random.default_rng(seed)
        ids = np.sort(draw.choice(self.coverage, size=min(samples, len(self.coverage)), replace=False))
        slots = draw.integers(0, self.n_views, size=len(ids))
        views = view_table(self.spec, self.view_seed, ids, self.n_views)[np.arange(len(ids)), slots]
        fresh = recompute(source, model, ids, views, torch.device(device))
        stored = self.lookup(ids, slots) if self.top_k is None else self.lookup_top_k(ids, slots)
        report = Verification.compare(stored, fresh, self.manifest["precision"], self.top_k)
        if not report.passed:
            worst = int(ids[report.worst_row])
            raise CacheMismatch(
                f"{self.path}: logits of {len(ids)} samples were recomputed and differ by up to "
                f"{report.largest_difference:.4g} (sample {worst}), allowed {report.allowed:.4g}: build the cache again"
            )
        return report

    def _positions(self, ids: IntArray) -> IntArray:
        """Rows of the samples in `coverage`."""
        if self._whole:
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

    def _result(self, count: int, out: Tensor | None) -> Tensor:
        shape = (count, self.classes)
        if out is None:
            return torch.empty(shape, dtype=self.dtype)
        if tuple(out.shape) != shape or out.dtype != self.dtype or out.device.type != "cpu":
            raise ShapeError(
                f"out is {tuple(out.shape)} {out.dtype} on {out.device}; needed: {shape} {self.dtype} on the CPU"
            )
        return out

    def _map(self, shard: int) -> tuple[npt.NDArray[Any], Callable[[int], None]]:
        """A shard's rows (n_views * n, ...), and the function that advises the kernel on their pages."""
        if shard not in self._maps:
            array = self._array(card.shard_file(shard), "r")
            size = min(self._per_shard, len(self.coverage) - shard * self._per_shard)
            if array.shape != (self.n_views, size, *self._rows.shape) or array.dtype != self._rows.element:
                raise CacheMismatch(
                    f"{self.path / card.shard_file(shard)} has shape {array.shape} and type {array.dtype}: build the "
                    "cache again"
                )
            self._maps[shard] = (array.reshape(-1, *self._rows.shape), cast(mmap.mmap, array.base).madvise)
        return self._maps[shard]

    def _read_coverage(self) -> IntArray:
        info = self.manifest["coverage"]
        if info["whole"]:
            return np.arange(info["samples"], dtype=np.int64)
        coverage: IntArray = np.array(self._array(card.COVERAGE), dtype=np.int64)
        if card.digest_ids(coverage) != info["digest"]:
            raise CacheMismatch(f"{self.path / card.COVERAGE} is not the manifest's: build the cache again")
        return coverage

    def _array(self, name: str, mode: Literal["r", "c"] = "c") -> npt.NDArray[Any]:
        path = self.path / name
        try:
            # Copy on write ("c"): callers may wrap the array in a tensor, which must be writable; the file is safe.
            array: npt.NDArray[Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CacheMismatch(f"cannot read {path} ({error}): build the cache again") from error
        return array
