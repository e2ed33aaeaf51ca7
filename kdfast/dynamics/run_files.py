"""The files of one run: an epoch at a time while recording, then sealed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.dynamics import format as layout
from kdfast.dynamics.plan import RecordingPlan
from kdfast.dynamics.values import EpochValues
from kdfast.errors import DataError, UsageError
from kdfast.files import FolderLock, atomic_write, remove_stale, schemas, sha256_file, write_sealed
from kdfast.files.arrays import read_npy, read_npz

_HEADER_BYTES = 4096  # more than the header of an array of one epoch, or a digest


class RunFiles:
    """The folder of a run.

    Args:
        folder: The folder; locked by the caller.
        plan: What the run records.
    """

    def __init__(self, folder: Path, plan: RecordingPlan) -> None:
        self.folder, self._plan = folder, plan

    @property
    def sealed(self) -> bool:
        """Whether all epochs are recorded and sealed."""
        return (self.folder / layout.SEAL).exists()

    def resume(self, mask: npt.NDArray[np.bool_]) -> int:
        """Check what is recorded, and the mask; write the mask of a new run.

        Args:
            mask: bool (N,), the samples that the run trains on.

        Returns:
            The first epoch that is not recorded.

        Raises:
            UsageError: The run has another mask.
            DataError: A file is damaged.
        """
        remove_stale(self.folder)
        path, packed = self.folder / layout.MASK, np.packbits(mask)
        if self.sealed:
            seal = layout.read_sealed_json(self.folder / layout.SEAL, schemas.RunSeal)
            layout.require_files(self.folder, seal["files"], check_sums=True)
        if path.exists():
            held = read_npy(path, shape=packed.shape, dtype=np.uint8, advice=self._record_again())
            if not np.array_equal(held, packed):
                raise UsageError(f"{self.folder} was started with another mask: choose another folder")
        else:
            _save(path, packed)
        if self.sealed:
            return self._plan.epochs
        epoch = 0
        while epoch < self._plan.epochs and (self.folder / layout.epoch_file(epoch)).exists():
            self.read_epoch(epoch)
            epoch += 1
        return epoch

    def write_epoch(self, epoch: int, values: EpochValues) -> None:
        """Write an epoch; its file last, because that marks the epoch as recorded."""
        packed: dict[str, Any] = {name: values.metrics[name] for name in self._plan.metrics}
        packed |= {name: np.packbits(values.metrics[name]) for name in self._plan.bits}
        for name in self._plan.arrays(epoch):
            path = self.folder / layout.array_file(name, epoch)
            _save(path, values.arrays[name])
            packed[layout.digest_name(name)] = np.array(sha256_file(path))
        with atomic_write(self.folder / layout.epoch_file(epoch)) as file:
            np.savez(file, **packed)

    def read_epoch(self, epoch: int) -> dict[str, npt.NDArray[Any]]:
        """Read an epoch of an unfinished run, and check its other files.

        Raises:
            DataError: Its files are damaged.
        """
        path, n = self.folder / layout.epoch_file(epoch), self._plan.samples
        arrays = read_npz(path, member_bytes=_HEADER_BYTES + 2 * n, advice=self._record_again())
        wanted: dict[str, tuple[np.dtype[Any], tuple[int]]] = {
            name: (np.dtype(np.float16), (n,)) for name in self._plan.metrics
        }
        wanted |= {name: (np.dtype(np.uint8), (-(-n // 8),)) for name in self._plan.bits}
        if any(name not in arrays or (arrays[name].dtype, arrays[name].shape) != wanted[name] for name in wanted):
            raise DataError(f"{path} does not hold an epoch of {n} samples: {self._record_again()}")
        for name in self._plan.arrays(epoch):
            file, digest = self.folder / layout.array_file(name, epoch), layout.digest_name(name)
            # Recorders of earlier versions wrote no digest of the features.
            if digest in arrays and str(arrays[digest]) != sha256_file(file):
                raise DataError(f"{file} is damaged: {self._record_again()}")
        return arrays

    def read_values(self, epoch: int) -> dict[str, npt.NDArray[Any]]:
        """Read an epoch of an unfinished run: metrics, correctness as bool (N,), and predictions."""
        arrays = {name: array for name, array in self.read_epoch(epoch).items() if name in self._plan.metrics}
        for name in self._plan.arrays(epoch):
            path = self.folder / layout.array_file(name, epoch)
            arrays[name] = read_npy(path, mmap_mode="r", advice=self._record_again())
        return arrays | {layout.CORRECT: self.read_bits(epoch, layout.CORRECT)}

    def read_bits(self, epoch: int, name: str) -> npt.NDArray[np.bool_]:
        """Read the bits of that name of an epoch of an unfinished run, bool (N,)."""
        return np.unpackbits(self.read_epoch(epoch)[name], count=self._plan.samples).astype(np.bool_)

    def discard_epochs(self, first: int = 0) -> None:
        """Remove the files of the epochs from `first` on."""
        for epoch in range(first, self._plan.epochs):
            (self.folder / layout.epoch_file(epoch)).unlink(missing_ok=True)

    def seal(self) -> None:
        """Join the epochs into the final arrays and write the seal."""
        numbers = range(self._plan.epochs)
        epochs = [self.read_epoch(epoch) for epoch in numbers]
        joined = [*self._plan.metrics, *self._plan.bits]
        for name in joined:
            _save(self.folder / f"{name}.npy", np.stack([epoch[name] for epoch in epochs]))
        names = [*(f"{name}.npy" for name in joined), layout.MASK]
        names += [layout.array_file(name, epoch) for epoch in numbers for name in self._plan.arrays(epoch)]
        write_sealed(self.folder / layout.SEAL, {"files": layout.compute_file_digests(self.folder, names)})

    def _record_again(self) -> str:
        return layout.record_again(self.folder)


def write_manifest(path: Path, runs: int) -> None:
    """Write the manifest of a folder if all of its runs are sealed."""
    seals = [path / layout.run_folder(run) / layout.SEAL for run in range(runs)]
    if not all(seal.exists() for seal in seals):
        return
    with FolderLock(path):
        plan = layout.read_sealed_json(path / layout.PLAN, schemas.DynamicsPlan)
        files = [layout.read_sealed_json(seal, schemas.RunSeal)["files"] for seal in seals]
        write_sealed(path / layout.MANIFEST, {**plan, "runs": files})


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with atomic_write(path) as file:
        np.save(file, array)
