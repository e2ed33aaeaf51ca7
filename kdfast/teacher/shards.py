"""Computing and writing one shard of a cache: all views of a range of samples.

A shard's files are written one by one under their final names, then its record with their SHA-256. A shard counts as
done when its record and the files agree, so a process killed at any moment costs at most the shard it was at.
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

from kdfast.data.source import Split
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import ViewSpec, view_table
from kdfast.errors import DataError
from kdfast.files import atomic_write, read_json, sha256_file, write_json
from kdfast.teacher.forward import Forward, Precision
from kdfast.teacher.manifest import BUILDING, shard_file
from kdfast.teacher.rows import Rows

_BLOCK_BYTES = 32 << 20
_BLOCK_ROWS = 1 << 14

Floats = npt.NDArray[np.floating[Any]]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """What the shards of one cache have in common.

    Attributes:
        folder: The cache's folder.
        plan_digest: Digest of the cache's plan; records of another plan do not count.
        split: Where the images come from.
        forward: The teacher.
        spec: The views there are.
        view_seed: Seed of the views' choice.
        n_views: Views per sample.
        rows: Form of the stored logits.
        precision: Of the arithmetic on views other than the identity.
        coverage: Sample ids of the whole cache, ascending.
        per_shard: Samples in each shard but the last.
    """

    folder: Path
    plan_digest: str
    split: Split
    forward: Forward
    spec: ViewSpec
    view_seed: int
    n_views: int
    rows: Rows
    precision: Precision
    coverage: IntArray
    per_shard: int

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-len(self.coverage) // self.per_shard)

    def ids(self, shard: int) -> IntArray:
        """Sample ids of a shard."""
        return self.coverage[shard * self.per_shard : (shard + 1) * self.per_shard]

    def part(self, kind: str, shard: int) -> Path:
        """Where a shard's identity logits ("identity") or features ("features") wait for the cache to be complete."""
        return self.folder / BUILDING / f"{kind}-{shard:05d}.npy"

    def record(self, shard: int) -> dict[str, Any] | None:
        """What is known of a shard that was written under this plan; None if it was not. Its files are not read."""
        path = self._record_path(shard)
        if not path.is_file():
            return None
        try:
            record = read_json(path)
        except DataError:
            return None  # as good as absent: the shard is computed again
        fits = isinstance(record, dict) and record.get("plan") == self.plan_digest and "files" in record
        return record if fits else None

    def is_sound(self, shard: int) -> bool:
        """Whether a shard is done and its files still are what was written."""
        record = self.record(shard)
        if record is None:
            return False
        paths = {name: self.folder / name for name in record["files"]}
        return all(path.is_file() and sha256_file(path) == record["files"][name] for name, path in paths.items())

    def write(self, shard: int, advance: Advance) -> None:
        """Compute a shard and write its files, then its record.

        Raises:
            DataError: A logit is not finite, or too large for the stored dtype.
            OutputError: The disk is full or read-only.
        """
        started = time.perf_counter()
        logits, identity, features = self._compute(self.ids(shard), advance)
        arrays = {
            self.folder / shard_file(shard): logits,
            self.part("identity", shard): identity,
            self.part("features", shard): features,
        }
        for path, array in arrays.items():
            with atomic_write(path) as file:
                np.save(file, array)
        files = {str(path.relative_to(self.folder)): sha256_file(path) for path in arrays}
        seconds = time.perf_counter() - started
        write_json(self._record_path(shard), {"plan": self.plan_digest, "files": files, "seconds": seconds})

    def _record_path(self, shard: int) -> Path:
        return self.folder / BUILDING / f"shard-{shard:05d}.json"

    def _compute(self, ids: IntArray, advance: Advance) -> tuple[npt.NDArray[Any], Floats, Floats]:
        """Logits (V, n, ...) in the stored form; identity logits (n, C) and features (n, D) in float32."""
        logits = np.empty((self.n_views, len(ids), *self.rows.shape), self.rows.element)
        identities, features = [], []
        for begin, block in self._blocks(ids):
            images = torch.from_numpy(self.split.read(block)).to(self.forward.device)
            identity, feature = self.forward.identity(images, block)
            table = view_table(self.spec, self.view_seed, block, self.n_views)
            # All rows have the identity in the same column, and its logits are known already.
            column = int(np.flatnonzero(table[0] == self.spec.identity)[0])
            others = np.delete(np.arange(self.n_views), column)
            end = begin + len(block)
            logits[column, begin:end] = self._packed(identity.numpy(), block)
            if len(others):
                rows = self.forward.views(images, table[:, others], block, self.precision).numpy()
                logits[others, begin:end] = self._packed(rows, block).swapaxes(0, 1)
            identities.append(identity.numpy())
            features.append(feature.numpy())
            advance(len(block) * self.n_views)
        return logits, np.concatenate(identities), np.concatenate(features)

    def _blocks(self, ids: IntArray) -> Iterator[tuple[int, IntArray]]:
        bytes_each = int(np.prod(self.split.shape))
        step = max(1, min(_BLOCK_ROWS // self.n_views, _BLOCK_BYTES // bytes_each))
        for begin in range(0, len(ids), step):
            yield begin, ids[begin : begin + step]

    def _packed(self, rows: npt.NDArray[np.float32], ids: IntArray) -> npt.NDArray[Any]:
        """Logits (n, ..., C) in the stored form, if every value is finite and fits the stored dtype."""
        largest = np.abs(rows).reshape(len(ids), -1).max(1)
        limit = float(np.finfo(self.rows.dtype).max)
        if bool((largest <= limit).all()):  # False for NaN too
            return self.rows.pack(rows)
        worst = int(np.flatnonzero(~(largest <= limit))[0])
        if not np.isfinite(largest[worst]):
            raise DataError(
                f"the teacher's logits on training sample {ids[worst]} are not finite: its weights or its "
                "normalisation are broken; check its accuracy first"
            )
        raise DataError(
            f"the teacher's logits on training sample {ids[worst]} reach {largest[worst]:.4g}, above {limit:.4g}, the "
            f"largest {self.rows.dtype}: build the cache with dtype float32"
        )
