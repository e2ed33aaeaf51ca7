"""From the paths of a cache and of dynamics to scores: open, check that they belong to the data, compute, describe."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kdfast.data.source import Source
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import CheckpointError, UsageError
from kdfast.files import sha256_file
from kdfast.nets.checkpoint import Model, load_model
from kdfast.prune.rules.base import OptionValue
from kdfast.prune.score_file import ScoreFile
from kdfast.prune.scores.registry import ScoreInputs, method_named, score
from kdfast.teacher.cache import TeacherCache

StrPath = str | os.PathLike[str]


def parse_options(given: list[str]) -> dict[str, OptionValue]:
    """Read `k=v` texts.

    Raises:
        UsageError: If one is not of that form, or a name comes twice.
    """
    options: dict[str, OptionValue] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"--option {text!r}: give name=value")
        if name in options:
            raise UsageError(f"--option {name} is given twice")
        options[name] = value
    return options


def open_inputs(
    source: Source,
    *,
    seed: int,
    cache: StrPath | None = None,
    dynamics: StrPath | None = None,
    teacher: StrPath | None = None,
    options: Mapping[str, OptionValue] | None = None,
    device: str = "cpu",
) -> tuple[ScoreInputs, dict[str, str]]:
    """Open what scores are computed from.

    Args:
        source: The data.
        seed: Seed of what a score draws.
        cache: Folder of a teacher's cache, or None.
        dynamics: Folder of dynamics, or None.
        teacher: A network's file, or None.
        options: The method's options.
        device: Where heavy work runs.

    Returns:
        The inputs, and the digest of each that was given.

    Raises:
        CacheMismatch: The cache is damaged, of other data, or does not cover all of it.
        DataError: The dynamics are unfinished, damaged, or of other data.
        CheckpointError: The network cannot be read, or has other classes.
    """
    labels = source.train.labels
    digests: dict[str, str] = {}
    logits = features = None
    if cache is not None:
        opened = TeacherCache.open(cache, source=source)
        opened.require(np.arange(len(labels), dtype=np.int64))
        logits, features = opened.identity_logits(), opened.features()
        digests["cache"] = sha256_file(Path(cache) / "manifest.json")
    recorded = None
    if dynamics is not None:
        recorded = Dynamics.open(dynamics, labels=labels, fingerprint=source.fingerprint)
        digests["dynamics"] = recorded.digest
    network = None if teacher is None else _network(teacher, source)
    if network is not None:
        digests["teacher"] = network.digest
    inputs = ScoreInputs(
        labels=labels,
        seed=seed,
        logits=logits,
        features=features,
        dynamics=recorded,
        device=device,
        options=dict(options or {}),
        source=source,
        network=network,
    )
    return inputs, digests


def compute(method: str, inputs: ScoreInputs, digests: Mapping[str, str], fingerprint: str) -> ScoreFile:
    """Score, and describe how.

    Args:
        method: A key of `SCORES`.
        inputs: From `open_inputs`.
        digests: Likewise.
        fingerprint: Of the data.

    Raises:
        UsageError, DataError: As `kdfast.prune.scores.registry.score`.
    """
    started = time.perf_counter()
    scored = score(method, inputs)
    seconds = time.perf_counter() - started
    needs = method_named(method).needs | {"teacher"}
    return ScoreFile(
        scores=scored.values,
        method=method,
        data=fingerprint,
        extras=scored.extras,
        parameters={**scored.used, "seed": inputs.seed},
        sources={name: digest for name, digest in digests.items() if name in needs},
        seconds=seconds,
    )


def _network(path: StrPath, source: Source) -> Model:
    model = load_model(path)
    if model.classes != len(source.classes):
        raise CheckpointError(
            f"{path} knows {model.classes} classes, {source.path} has {len(source.classes)}; give one of this data"
        )
    return model
