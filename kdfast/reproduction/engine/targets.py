"""Where the teacher's logits of a run come from: one rule, so that equal runs have them from the same place."""

from __future__ import annotations

from kdfast.data.source import Source
from kdfast.distillation.config import RunConfig
from kdfast.distillation.targets import CachedTargets, OnlineTargets
from kdfast.reproduction.cells import Cell
from kdfast.reproduction.selection import compressed_epochs
from kdfast.reproduction.study import Study

CACHE, ONLINE = CachedTargets.name, OnlineTargets.name


def choose_targets(study: Study, cell: Cell, source: Source, config: RunConfig, epochs: int | None) -> str | None:
    """Return where a run gets its teacher's logits from; None without a teacher.

    A cache holds all views of the cell's samples. It pays if the cells that share teacher and samples show them more
    often than there are views. All such cells of the study count, whichever of them are run, so that the answer is the
    same in every command; but runs on all data for the steps of a fraction, often the only ones that are run, do not
    wait for a cache that only runs of all epochs pay for. Activations and the logits of mixed or drawn images only the
    teacher itself has.

    Args:
        study: The study.
        cell: The cell.
        source: The data.
        config: Settings of a run of the cell.
        epochs: Epochs in place of the recipe's.
    """
    if not cell.kd:
        return None
    if not _is_cacheable(cell) or source.view_spec.is_drawn:
        return ONLINE
    shared = _group(cell)
    shown = sum(
        compressed_epochs(study, other, epochs, len(source.train))
        for other in study.cells
        if other.kd and _group(other) == shared and _is_cacheable(other)
    )
    return CACHE if (config.views or source.view_spec.count) < shown else ONLINE


def _group(cell: Cell) -> tuple[object, ...]:
    return cell.teacher, cell.teacher_fraction, cell.method, cell.fraction, cell.disjoint, cell.match_steps_of


def _is_cacheable(cell: Cell) -> bool:
    config = cell.run_config(epochs=int(dict(cell.recipe)["epochs"]), seed=0, precision="fp32")
    return not config.mixes and not any(term.entry.taps for term in config.terms)
