"""The score `influence-fvm` from a teacher as it was trained: flatten it, then score, with files to resume from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kdfast.data.source import Source
from kdfast.errors import DataError, UsageError
from kdfast.nets.checkpoint import Model
from kdfast.progress import Progress
from kdfast.pruning.options import OptionValue, complete_options
from kdfast.pruning.score_file import ScoreFile, check_score_path, read_scores, write_scores
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.scores.registry import get_score
from kdfast.teacher.flatten import FlattenConfig, flatten_teacher
from kdfast.teacher.flatten.flatten import METADATA_KEY

FVM = "influence-fvm"


def state_paths(path: Path) -> tuple[Path, Path]:
    """Return the files that hold the state of the flattening and the finished scores, for a subset file."""
    return path.with_suffix(".search.pt"), path.with_suffix(".search.npz")


def is_flattened(network: Model) -> bool:
    """Return whether a network was written by kdfast teacher flatten."""
    return METADATA_KEY in network.metadata


def flatten_network(
    sources: ScoreSources,
    config: FlattenConfig,
    *,
    device: str = "cpu",
    state: Path | None = None,
    progress: Progress | None = None,
) -> ScoreSources:
    """Return the inputs of scores with the network flattened; a network that is flat already is left as it is.

    Args:
        sources: Inputs with a network.
        config: How to flatten.
        device: Device to compute on.
        state: File of the flattening's state, to resume from; the caller deletes it.
        progress: Called with (steps done, steps, note).

    Raises:
        UsageError: There is no network.
        KdfastError: As `flatten_teacher`.
    """
    if sources.network is None:
        raise UsageError(f"{FVM} needs a network: pass `teacher`, or finished scores as `scores`")
    if is_flattened(sources.network):
        return sources
    flat = flatten_teacher(sources.network, sources.source, config, state=state, progress=progress, device=device)
    return replace(sources, network=flat)


def fvm_scores(
    sources: ScoreSources,
    options: Mapping[str, OptionValue],
    *,
    seed: int,
    device: str = "cpu",
    state: Path | None = None,
    progress: Progress | None = None,
) -> ScoreFile:
    """Compute the scores, or read them from the state of an interrupted command.

    Args:
        sources: Inputs with a network.
        options: Options of the score.
        seed: Seed of the score.
        device: Device to compute on.
        state: Score file in which the result is kept; the caller deletes it. None: not kept.
        progress: Called with (done, total, note).

    Raises:
        KdfastError: As `compute_score`; or the state cannot be written.
    """
    kept = None if state is None else _read_state(state, sources, options, seed)
    if kept is not None:
        return kept
    if state is not None:
        check_score_path(state)
    found = sources.score(FVM, seed=seed, options=options, device=device, progress=progress)
    if state is not None:
        write_scores(state, found)
    return found


def _read_state(path: Path, sources: ScoreSources, options: Mapping[str, OptionValue], seed: int) -> ScoreFile | None:
    """Return the scores in a file, or None if it is missing, damaged, or holds others: they are computed again."""
    source: Source = sources.source
    try:
        found = read_scores(path, n=len(source.train), fingerprint=source.fingerprint)
    except (DataError, UsageError):
        return None
    wanted = {**complete_options(FVM, get_score(FVM).options, options), "seed": seed}
    same = found.method == FVM and found.sources.get("teacher") == sources.digests.get("teacher")
    return found if same and all(found.parameters.get(name) == value for name, value in wanted.items()) else None
