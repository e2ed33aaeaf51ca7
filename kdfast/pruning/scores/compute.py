"""Open what scores are computed from, check that it belongs to the data, and compute a score with its provenance."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kdfast.data.source import Source
from kdfast.distributed.group import Distributed
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import CacheMismatch
from kdfast.files import sha256_file
from kdfast.files.arrays import map_read_only
from kdfast.nets.checkpoint import Model, load_model
from kdfast.nets.fit import check_fit
from kdfast.progress import Progress
from kdfast.pruning.options import OptionValue
from kdfast.pruning.score_file import ScoreFile
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score, get_score
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.flatten.flatten import METADATA_KEY

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class ScoreSources:
    """Inputs of scores, opened and checked against the data.

    Attributes:
        source: The data.
        cache: A teacher's cache of every training sample, or None.
        dynamics: Recorded training dynamics, or None.
        network: A network, or None.
    """

    source: Source
    cache: TeacherCache | None = None
    dynamics: Dynamics | None = None
    network: Model | None = None

    @classmethod
    def open(
        cls,
        source: Source,
        *,
        cache: StrPath | None = None,
        dynamics: StrPath | None = None,
        teacher: StrPath | Model | None = None,
    ) -> ScoreSources:
        """Open the folders and the file that are given.

        Args:
            source: The data.
            cache: Folder of a teacher's cache, or None.
            dynamics: Folder of training dynamics, or None.
            teacher: A network or its file, or None.

        Raises:
            CacheMismatch: The cache is damaged, belongs to other data, or lacks samples; or the network is neither its
                teacher nor flattened from it.
            DataError: The dynamics are unfinished, damaged, or belong to other data.
            CheckpointError: The network cannot be read, or has another number of classes.
        """
        labels = source.train.labels
        opened = None
        if cache is not None:
            opened = TeacherCache.open(cache, source=source, check_views=False)
            opened.check_covers(np.arange(len(labels), dtype=np.int64))
        recorded = None
        if dynamics is not None:
            recorded = Dynamics.open(dynamics, labels=labels, fingerprint=source.fingerprint)
        network = None if teacher is None else _load_network(teacher, source)
        if teacher is not None and network is not None and opened is not None:
            _check_same_teacher(network, _name_of(teacher), opened)
        return cls(source, opened, recorded, network)

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digest of each input there is, by name."""
        digests = {}
        if self.cache is not None:
            digests["cache"] = sha256_file(self.cache.path / "manifest.json")
        if self.dynamics is not None:
            digests["dynamics"] = self.dynamics.digest
        if self.network is not None:
            digests["teacher"] = self.network.digest
        return digests

    def inputs(
        self,
        name: str,
        *,
        seed: int,
        options: Mapping[str, OptionValue] | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
        distributed: Distributed | None = None,
    ) -> ScoreInputs:
        """Return the inputs of a score: those there are, of those it can use.

        Args:
            name: A key of `SCORES`.
            seed: Seed of the score's random draws.
            options: Options of the score.
            device: Device for expensive computations.
            progress: Called with (done, total, note) by scores that take long.
            distributed: This process among those that share the work, with its group entered; None for a single one.
        """
        options = dict(options or {})
        usable = get_score(name).usable_inputs(options)
        cache = self.cache if "cache" in usable else None
        return ScoreInputs(
            labels=self.source.train.labels,
            seed=seed,
            logits=None if cache is None else map_read_only(cache.identity_logits()),
            features=None if cache is None or not cache.has_features else map_read_only(cache.features()),
            dynamics=self.dynamics if "dynamics" in usable else None,
            device=device,
            options=options,
            source=self.source,
            network=self.network,
            progress=progress,
            distributed=distributed or Distributed(),
        )

    def score(
        self,
        name: str,
        *,
        seed: int,
        options: Mapping[str, OptionValue] | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
        distributed: Distributed | None = None,
    ) -> ScoreFile:
        """Compute a score with its provenance; arguments and errors as for `inputs` and `compute_score`."""
        inputs = self.inputs(
            name, seed=seed, options=options, device=device, progress=progress, distributed=distributed
        )
        started = time.perf_counter()
        result = compute_score(name, inputs)
        seconds = time.perf_counter() - started
        recorded = get_score(name).usable_inputs(dict(options or {}))
        return ScoreFile(
            scores=result.values,
            method=name,
            data=self.source.fingerprint,
            extras=result.extras,
            parameters={**result.used, "seed": seed},
            sources={source: digest for source, digest in self.digests.items() if source in recorded},
            seconds=seconds,
        )


def _check_same_teacher(network: Model, path: str, cache: TeacherCache) -> None:
    flattened = network.metadata.get(METADATA_KEY)
    what, origin = "is the network", network.digest
    if isinstance(flattened, dict):
        what, origin = "was flattened from the teacher", str(flattened.get("teacher"))
    if origin != cache.teacher_digest:
        raise CacheMismatch(
            f"{path} {what} {origin[:12]}, but {cache.path} is the cache of the teacher {cache.teacher_digest[:12]} "
            "(digests of weights): pass `teacher` and `cache` of one teacher"
        )


def _load_network(teacher: StrPath | Model, source: Source) -> Model:
    model = teacher if isinstance(teacher, Model) else load_model(teacher)
    check_fit(model, source, _name_of(teacher))
    return model


def _name_of(teacher: StrPath | Model) -> str:
    return "`teacher`" if isinstance(teacher, Model) else str(teacher)
