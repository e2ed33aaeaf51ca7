"""The plan of a cache: all that decides what it holds. Only for the same plan is a build resumed, a cache accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kdfast
from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.errors import CacheMismatch, OutputError
from kdfast.files import visible_entries
from kdfast.nets.checkpoint import Model
from kdfast.teacher.manifest import (
    BUILDING,
    FORMAT,
    MANIFEST,
    PLAN,
    VERSION,
    differences,
    digest_ids,
    read_sealed,
    write_sealed,
)


def make_plan(source: Source, model: Model, coverage: IntArray, n_views: int, view_seed: int) -> dict[str, Any]:
    """All that decides what the cache will hold, apart from how it is computed."""
    norm = model.normalization
    return {
        "format": FORMAT,
        "version": VERSION,
        "kdfast": kdfast.__version__,
        "data": {
            "fingerprint": source.fingerprint,
            "samples": len(source.train),
            "classes": len(source.classes),
            "image": list(source.train.shape),
        },
        "teacher": {
            "net": model.name,
            "digest": model.digest,
            "mean": list(norm.mean),
            "std": list(norm.std),
        },
        "views": {"spec": source.views.to_dict(), "view_seed": view_seed, "n_views": n_views},
        "coverage": {
            "samples": len(coverage),
            "whole": len(coverage) == len(source.train),
            "digest": digest_ids(coverage),
        },
    }


def check_place(folder: Path) -> None:
    """Make sure that the folder is missing or empty, or holds a cache, finished or not; nothing in it is touched.

    Raises:
        OutputError: It holds something else.
    """
    taken = [name for name in visible_entries(folder) if name != BUILDING]
    # The plan is there before the first file of a cache is, and gone after the manifest has come: look in this order.
    if taken and not (folder / BUILDING / PLAN).exists() and not (folder / MANIFEST).exists():
        raise OutputError(f"{folder} holds {taken[0]} of something else: give an empty or new folder for the cache")


def agree_on_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or make sure that the unfinished build in the folder follows the same one.

    Raises:
        CacheMismatch: The folder holds an unfinished cache of another plan.
    """
    path = folder / BUILDING / PLAN
    if not path.exists():
        write_sealed(path, plan)
    # Read back even when just written: two ranks may start with different options at the same moment.
    require_same(folder, read_sealed(path), plan, "an unfinished cache")


def require_same(folder: Path, found: dict[str, Any], plan: dict[str, Any], what: str) -> None:
    """Raise CacheMismatch naming the fields of the plan in which what was found (called `what`) differs."""
    if odd := differences(found, plan):
        raise CacheMismatch(
            f"{folder} holds {what} made otherwise: {'; '.join(odd)}. "
            "Give the same options, another folder, or delete it"
        )


def train_accuracy(logits: npt.NDArray[np.float32], labels: IntArray) -> float:
    """Top-1 accuracy, in percent, of logits (n, C) against labels (n,)."""
    return 100 * float(np.count_nonzero(logits.argmax(1) == labels)) / len(labels)
