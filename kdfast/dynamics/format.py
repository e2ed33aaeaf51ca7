"""The folder format of recorded dynamics, shared by the recorder and the reader.

- `plan.json`: what to record (samples, epochs, digest of the labels, fingerprint of the data); written first.
- `labels.npy`: int64 (N,).
- `run-00/`, one folder per training run:
    - `p_y.npy`, `margin.npy`, `el2n.npy`, `p_other.npy`: float16 (E, N); version 1 has no `p_other.npy`.
    - `correct.npy`: uint8 (E, ceil(N / 8)), one bit per sample. `correct_batch.npy` is of the same form and there if
      the plan has `record` batch.
    - `mask.npy`: uint8 (ceil(N / 8),), one bit per sample: whether the run trained on it.
    - `features-0019.npy`: float32 (N, D), after that epoch.
    - `top-ids-0007.npy`: unsigned integers (N, k), the most probable classes after that epoch, and `top-p-0007.npy`:
      float16 (N, k), their probabilities. Both if the plan has a `top_k` k.
    - `epoch-0007.npz`: while recording, one epoch of the float16 values and of the bits, and the SHA-256 of the other
      files of that epoch.
    - `sealed.json`: size and SHA-256 of the run's files; written once all epochs are recorded.
- `manifest.json`: the plan and the seals of all runs; written last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.errors import DataError, UsageError
from kdfast.files import is_plain_name, read_sealed, sha256_file
from kdfast.files.validate import check_type

FORMAT = "kdfast-dynamics"
VERSION = 2
MANIFEST = "manifest.json"
PLAN = "plan.json"
LABELS = "labels.npy"
SEAL = "sealed.json"
CORRECT, CORRECT_BATCH = "correct", "correct_batch"
MASK = "mask.npy"
# When correctness is recorded: after each epoch, or also in its training batches.
RECORD = ("epoch", "batch")
# Arrays of an epoch in files of their own. Its own file holds the SHA-256 of each as NAME_sha256.
FEATURES, TOP_IDS, TOP_P = "features", "top_ids", "top_p"
# Recorded per sample and epoch as float16, by version of the format.
METRICS = {1: ("p_y", "margin", "el2n"), VERSION: ("p_y", "margin", "el2n", "p_other")}


def run_folder(run: int) -> str:
    """Return the name of a run's folder."""
    return f"run-{run:02d}"


def array_file(name: str, epoch: int) -> str:
    """Return the file name of the features, or another array with a file for each epoch, counted from 0."""
    return f"{name.replace('_', '-')}-{epoch:04d}.npy"


def digest_name(name: str) -> str:
    """Return the name of the SHA-256 of such an array in the file of its epoch."""
    return f"{name}_sha256"


def epoch_file(epoch: int) -> str:
    """Return the file name of one epoch's metrics while recording, counted from 0."""
    return f"epoch-{epoch:04d}.npz"


def check_when(name: str, value: str) -> None:
    """Check an argument that is one of `RECORD`.

    Raises:
        UsageError: It is none of them.
    """
    if value not in RECORD:
        raise UsageError(f"`{name}` is {value!r}: pass one of {', '.join(RECORD)}")


def class_dtype(classes: int) -> np.dtype[Any]:
    """Return the smallest unsigned type of class ids."""
    return np.min_scalar_type(classes - 1)


def bits_per_sample(top_k: int, classes: int, record: str) -> int:
    """Return the bits that an epoch takes per sample, without features."""
    correct = 2 if record == "batch" else 1
    return 16 * len(METRICS[VERSION]) + correct + top_k * (16 + 8 * class_dtype(classes).itemsize)


def labels_digest(labels: npt.NDArray[np.int64]) -> str:
    """Return the SHA-256 (hexadecimal) of the labels of the training split."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def compute_file_digests(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of each file."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}


def read_sealed_json(path: Path, schema: type) -> dict[str, Any]:
    """Read a plan, a seal or a manifest.

    Args:
        path: The file.
        schema: What it must hold, a class of `kdfast.files.schemas`.

    Raises:
        DataError: The file is missing or damaged.
    """
    advice = f"delete {path.parent} and run kdfast dynamics again"
    if path.name == MANIFEST:
        advice = "run kdfast dynamics again, which writes it anew"
    try:
        fields = read_sealed(path)
    except (OSError, ValueError) as error:
        state = "is damaged" if path.exists() else "is missing"
        raise DataError(f"{path} {state}: {advice}") from error
    check_type(fields, schema, path, advice=advice)
    return fields


def record_again(folder: Path) -> str:
    """Return what messages advise if the folder of a run is damaged."""
    return f"delete {folder} and record that run again"


def require_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, check_sums: bool) -> None:
    """Compare files with their sizes and digests in a seal.

    Args:
        folder: The folder of the files.
        files: The result of `compute_file_digests`.
        check_sums: Compare not only sizes but also SHA-256.

    Raises:
        DataError: A file is missing or has changed.
    """
    for name, seal in files.items():
        if not is_plain_name(name):
            raise DataError(f"{folder} names {name!r}, which is no file of it: {record_again(folder)}")
        path = folder / name
        held = path.stat().st_size if path.is_file() else None
        if held != seal["bytes"] or (check_sums and sha256_file(path) != seal["sha256"]):
            found = "missing" if held is None else "damaged"
            raise DataError(f"{path} is {found}: {record_again(folder)}")
