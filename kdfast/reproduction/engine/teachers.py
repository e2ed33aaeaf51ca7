"""Teachers of a study: what identifies one before it exists, its samples, and the teachers of given files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import Subset
from kdfast.data.views import Normalization
from kdfast.errors import UsageError
from kdfast.files import sha256_json
from kdfast.nets.checkpoint import Model, is_own_checkpoint
from kdfast.nets.fit import check_fit
from kdfast.nets.foreign import read_torch_file
from kdfast.nets.importing import import_checkpoint
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.select import SelectionMethod, SubsetPipeline
from kdfast.reproduction.cells import Cell

# Seed of teachers: of the share of the data, the weights and the order. No student's, so that a share of the data for a
# teacher and one for a student are independent draws.
TEACHER_SEED = 1000


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher, as far as it is known before it exists.

    Attributes:
        net: Its network.
        fraction: Share of the training split that it is trained on.
        identity: What determines it: the digest of a given file, or the settings of its training. JSON values.
        given: The model of a given file.
    """

    net: str
    fraction: float
    identity: dict[str, Any]
    given: Model | None = None

    @property
    def name(self) -> str:
        """Name of its files, without a suffix."""
        return f"{plain_name(self.net)}-{self.fraction:g}-{sha256_json(self.identity)[:8]}"


def read_given(
    files: Mapping[str, str], used: set[str], source: Source, normalization: Normalization | None
) -> dict[str, Model]:
    """Return the teachers of files by network, checked against the data.

    Args:
        files: Files by network, of kdfast or of another program.
        used: Networks of the cells' teachers.
        source: The data.
        normalization: Input statistics of files that do not hold them.

    Raises:
        UsageError: The cells have no such teacher, or a file needs `normalization`.
        CheckpointError: A file cannot be read, or does not fit the network or the data.
    """
    models = {}
    for net, path in files.items():
        if net not in used:
            known = ", ".join(sorted(used)) or "none"
            raise UsageError(f"`teachers` names {net}, and the networks of these cells' teachers are: {known}")
        own = is_own_checkpoint(read_torch_file(Path(path), advice="pass another file"))
        models[net], _ = import_checkpoint(
            path,
            net=net,
            classes=len(source.classes),
            class_names=source.classes,
            normalization=None if own else normalization,
        )
        check_fit(models[net], source, path)
    return models


def teacher_samples(source: Source, fraction: float) -> Subset | None:
    """Return the samples that a teacher on a share of the training split is trained on; None for all.

    Raises:
        SubsetError: The share is too small.
    """
    if fraction == 1:
        return None
    method = SelectionMethod("random", rule="hard")
    selection = SubsetPipeline(ScoreSources(source)).select(method, fraction, TEACHER_SEED)
    return Subset(selection.ids, selection.provenance, None)


def excluded_samples(source: Source, cell: Cell) -> IntArray | None:
    """Return the samples that must not be chosen for a cell, those of its teacher; None: any may be."""
    samples = teacher_samples(source, cell.teacher_fraction or 1.0) if cell.disjoint else None
    return None if samples is None else samples.ids


def plain_name(name: str) -> str:
    """Return a name as a part of the name of a file."""
    return re.sub(r"[^A-Za-z0-9.=_+-]+", "-", name)[:60]
