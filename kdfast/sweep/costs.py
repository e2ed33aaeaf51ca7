"""What a row of a sweep cost, stage by stage: recorded when it is written, read for its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdfast.distillation.folder.content import read_result
from kdfast.distillation.record_dynamics import TRAINING_FOLDER
from kdfast.dynamics.format import run_folder
from kdfast.dynamics.reader import Dynamics
from kdfast.pruning.own_scores import describe_scores
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.select import Selection
from kdfast.teacher.cache import TeacherCache

Seconds = dict[str, float | None]

# The stages that come before the training of a student, in their order; the name in a row, and for people.
STAGES = {
    "dynamics": "dynamics",
    "flatten": "flattened teacher",
    "scores": "scores",
    "cache": "teacher's cache",
    "selection": "selection",
}
TRAINING = "training"


def stage_seconds(selection: Selection, sources: ScoreSources, views: int) -> Seconds:
    """Return the seconds of the stages that a subset and its training need, before the training.

    Only what the fraction needs counts. Of the teacher's cache, that is the images of the kept samples in all of their
    views, and one view of every sample if the subset is computed from the cache. Scores, dynamics and the cache count
    in full in every row, as if it were the only one. The training of the teacher itself is left out.

    Args:
        selection: The subset.
        sources: The inputs of the sweep.
        views: Cached views that the training uses; 0 without a cache.

    Returns:
        Seconds by stage, keys of `STAGES`; None for what is not known. Stages that are not needed are absent.
    """
    used: Mapping[str, str] = selection.provenance["sources"]
    parameters = selection.provenance["parameters"].get("score", {})
    score_seconds: float | None = selection.provenance.get("score_seconds")
    seconds: Seconds = {}
    if "dynamics" in used:
        known = used["dynamics"] == sources.digests.get("dynamics")
        seconds["dynamics"] = dynamics_seconds(sources.dynamics) if known else None
    if str(parameters.get("network", "")).startswith("flattened"):
        seconds["flatten"] = None
    if score_seconds is not None:
        method = str(parameters.get("method", selection.provenance["method"]))
        foreign = describe_scores(method, parameters) is not None
        seconds["scores"] = None if foreign else score_seconds
    kept = len(selection.ids) if views else 0
    if "cache" in used or views:
        known = used.get("cache", sources.digests.get("cache")) == sources.digests.get("cache")
        seconds["cache"] = cache_seconds(sources.cache, kept, views, whole="cache" in used) if known else None
    seconds["selection"] = max(0.0, selection.provenance["seconds"] - (score_seconds or 0.0))
    return seconds


def dynamics_seconds(dynamics: Dynamics | None) -> float | None:
    """Return the seconds of the training of all recorded runs; None if kdfast did not train them."""
    if dynamics is None:
        return None
    total = 0.0
    for run in range(dynamics.runs):
        result = read_result(dynamics.path / run_folder(run) / TRAINING_FOLDER)
        if result is None:
            return None
        total += result["seconds"]
    return total


def cache_seconds(cache: TeacherCache | None, kept: int, views: int, *, whole: bool) -> float | None:
    """Return the seconds of the part of a cache that a subset needs.

    Args:
        cache: The cache.
        kept: Kept samples that are trained on.
        views: Views of each of them.
        whole: Whether every sample is needed too, in one view.

    Returns:
        The seconds; None if another program computed the logits.
    """
    if cache is None or cache.is_imported:
        return None
    images = kept * views + (len(cache) - kept if whole else 0)
    return float(cache.manifest["seconds"]) * images / (len(cache) * cache.n_views)


def row_seconds(row: Mapping[str, Any]) -> Seconds:
    """Return the seconds of a row by stage, the training last; None for what is not known.

    Rows of earlier versions know the seconds of selection, with those of a score computed for it, and training.
    """
    costs: Seconds | None = row.get("costs")
    if costs is None:
        costs = {"selection": row["subset_seconds"]} if "subset_seconds" in row else {}
    return {**{stage: costs[stage] for stage in STAGES if stage in costs}, TRAINING: row["seconds"]}


def known_seconds(row: Mapping[str, Any]) -> float:
    """Return the sum of the known seconds of a row."""
    return sum(value for value in row_seconds(row).values() if value is not None)
