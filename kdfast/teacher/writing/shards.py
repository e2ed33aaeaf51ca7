"""Compute and write one shard of a cache: all views of a range of samples.

A shard's files are written one by one under their final names, then its record with their SHA-256. A shard counts as
done when its record and the files agree, so a process killed at any moment loses at most its current shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.source import Split
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import ViewSpec, view_table
from kdfast.errors import DataError
from kdfast.files import atomic_write, read_json, schemas, sha256_file, write_json
from kdfast.teacher.manifest import BUILDING, shard_file
from kdfast.teacher.predictor import Precision, Predictor
from kdfast.teacher.row_format import RowFormat

_BLOCK_BYTES = 32 << 20
_BLOCK_ROWS = 1 << 14

Floats = npt.NDArray[np.floating[Any]]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class ShardFiles:
    """Files of the shards of one cache that is being built.

    Attributes:
        folder: The cache's folder.
        plan_digest: Digest of the cache's plan; records of another plan are ignored.
        coverage: Sample ids of the whole cache, ascending.
        per_shard: Samples in each shard except the last.
    """

    folder: Path
    plan_digest: str
    coverage: IntArray
    per_shard: int

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return -(-len(self.coverage) // self.per_shard)

    def sample_ids(self, shard: int) -> IntArray:
        """Return the sample ids of a shard."""
        return self.coverage[shard * self.per_shard : (shard + 1) * self.per_shard]

    def part_path(self, kind: str, shard: int) -> Path:
        """Return where a shard's "identity" logits or "features" are stored until the cache is complete."""
        return self.folder / BUILDING / f"{kind}-{shard:05d}.npy"

    def read_record(self, shard: int) -> dict[str, Any] | None:
        """Return the record of a shard written under this plan, or None without one. Its files are not read."""
        path = self._record_path(shard)
        if not path.is_file():
            return None
        try:
            record: dict[str, Any] = read_json(path, schemas.ShardRecord)
        except DataError:
            return None  # a damaged record is like none: the shard is computed again
        if record["plan"] != self.plan_digest:
            return None
        names = {str(path.relative_to(self.folder)) for path in self._part_paths(shard)}
        return record if record["files"].keys() == names else None

    def is_done(self, shard: int) -> bool:
        """Return whether a shard has a record and its files have not changed since."""
        record = self.read_record(shard)
        if record is None:
            return False
        paths = {name: self.folder / name for name in record["files"]}
        return all(path.is_file() and sha256_file(path) == record["files"][name] for name, path in paths.items())

    def paths(self, shard: int) -> tuple[Path, ...]:
        """Return where a shard's arrays are stored, and last its record."""
        return *self._part_paths(shard), self._record_path(shard)

    def _part_paths(self, shard: int) -> tuple[Path, Path, Path]:
        """Return where a shard's logits, identity logits and features are stored."""
        return self.folder / shard_file(shard), self.part_path("identity", shard), self.part_path("features", shard)

    def _record_path(self, shard: int) -> Path:
        return self.folder / BUILDING / f"shard-{shard:05d}.json"


@dataclass(frozen=True)
class ShardBuilder(ShardFiles):
    """Computes, writes and checks the shards of one cache.

    Attributes:
        split: Source of the images.
        predictor: Runs the teacher.
        spec: The data's set of views.
        view_seed: Seed of the choice of views.
        n_views: Views per sample.
        rows: Format of the stored logits.
        precision: Arithmetic for views other than the identity.
    """

    split: Split
    predictor: Predictor
    spec: ViewSpec
    view_seed: int
    n_views: int
    rows: RowFormat
    precision: Precision

    def write(self, shard: int, advance: Advance) -> None:
        """Compute a shard and write its files, then its record.

        Raises:
            DataError: A logit is not finite, or too large for the stored dtype.
            OutputError: The disk is full or read-only.
        """
        started = time.perf_counter()
        logits, identity, features = self.compute(self.sample_ids(shard), advance)
        arrays = dict(zip(self._part_paths(shard), (logits, identity, features), strict=True))
        for path, array in arrays.items():
            with atomic_write(path) as file:
                np.save(file, array)
        files = {str(path.relative_to(self.folder)): sha256_file(path) for path in arrays}
        seconds = time.perf_counter() - started
        write_json(self._record_path(shard), {"plan": self.plan_digest, "files": files, "seconds": seconds})

    def compute(self, ids: IntArray, advance: Advance) -> tuple[npt.NDArray[Any], Floats, Floats]:
        """Return rows (V, n, ...) in the stored format; identity logits (n, C) and features (n, D) in float32.

        Raises:
            DataError: A logit is not finite, or too large for the stored dtype.
        """
        stored = np.empty((self.n_views, len(ids), *self.rows.shape), self.rows.element)
        identities, features = [], []
        for begin, block in self._blocks(ids):
            images = torch.from_numpy(self.split.read(block)).to(self.predictor.device)
            identity, feature = self.predictor.predict_identity(images, block)
            table = view_table(self.spec, self.view_seed, block, self.n_views)
            # The identity has the same index in every row, and its logits are computed already.
            identity_index = int(np.flatnonzero(table[0] == self.spec.identity)[0])
            others = np.delete(np.arange(self.n_views), identity_index)
            end = begin + len(block)
            stored[identity_index, begin:end] = self._pack(feature if self.rows.features else identity, block)
            if len(others):
                keep = {"features": True} if self.rows.features else {}
                rows = self.predictor.predict_views(images, table[:, others], block, self.precision, **keep)
                stored[others, begin:end] = self._pack(rows, block).swapaxes(0, 1)
            identities.append(identity.numpy())
            features.append(feature.numpy())
            advance(len(block) * self.n_views)
        return stored, np.concatenate(identities), np.concatenate(features)

    def _blocks(self, ids: IntArray) -> Iterator[tuple[int, IntArray]]:
        bytes_each = int(np.prod(self.split.shape))
        step = max(1, min(_BLOCK_ROWS // self.n_views, _BLOCK_BYTES // bytes_each))
        for begin in range(0, len(ids), step):
            yield begin, ids[begin : begin + step]

    def _pack(self, outputs: Tensor, ids: IntArray) -> npt.NDArray[Any]:
        """Convert logits or features (n, ..., width) to rows; raise if one is not finite or overflows its dtype."""
        rows, what = outputs.numpy(), "features" if self.rows.features else "logits"
        largest = np.abs(rows).reshape(len(ids), -1).max(1)
        limit = float(np.finfo(self.rows.dtype).max)
        if bool((largest <= limit).all()):  # False for NaN too
            packed = self.rows.pack(rows)
            if self.rows.top_k is not None and not np.isfinite(packed["tail"]).all():
                raise DataError(
                    f"the teacher's logits divided by the temperature {self.rows.top_k.temperatures[0]:g} exceed "
                    f"{limit:.4g}, the largest {self.rows.dtype}: build the cache with `dtype` float32"
                )
            return packed
        worst = int(np.flatnonzero(~(largest <= limit))[0])
        if not np.isfinite(largest[worst]):
            raise DataError(
                f"the teacher's {what} on training sample {ids[worst]} are not finite: its weights or its "
                "normalization are wrong; check its accuracy first"
            )
        raise DataError(
            f"the teacher's {what} on training sample {ids[worst]} reach {largest[worst]:.4g}, above {limit:.4g}, the "
            f"largest {self.rows.dtype}: build the cache with `dtype` float32"
        )
