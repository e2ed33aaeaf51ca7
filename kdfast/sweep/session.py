"""One process of a sweep: the expensive inputs, opened once, and the runs made from them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import kdfast
from kdfast.data.loaders import make_loader
from kdfast.data.readers.registry import normalization_of, open_source
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import class_budgets, subset_size
from kdfast.device import resolve_device
from kdfast.distill.distributed import Ranks
from kdfast.distill.folder import RunFolder
from kdfast.distill.plan import Opened, Plan, assemble, check_student
from kdfast.distill.schedule import parse_alpha
from kdfast.distill.teacher_targets import TeacherSide
from kdfast.distill.train import Advance, Watch, train
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import SubsetError, UsageError
from kdfast.files import check_writable
from kdfast.prune.score_file import ScoreFile, read_scores
from kdfast.prune.selectors import CHOOSERS
from kdfast.sweep.grid import Cell, SweepConfig
from kdfast.sweep.recipes import Recipe, make_recipe
from kdfast.sweep.subsets import Subsets
from kdfast.teacher.cache import TeacherCache

RUNS = "runs"


class Session:
    """What the runs of a sweep share; opening it checks everything that can be checked and writes nothing.

    Args:
        config: The sweep's settings.

    Attributes:
        config: The settings.

    Raises:
        UsageError: If a method is unknown or lacks an input, or options do not fit together.
        DataError, CacheMismatch: If an input is damaged or does not fit the others.
        SubsetError: If a fraction keeps too little.
    """

    def __init__(self, config: SweepConfig) -> None:
        self._device = resolve_device(config.device)
        self.config = config
        self._source = source = open_source(config.data, size=config.size)
        self._check_sizes()
        labels, fingerprint = source.train.labels, source.fingerprint
        files = {
            name: read_scores(path, n=len(labels), fingerprint=fingerprint) for name, path in config.scores.items()
        }
        given = frozenset(name for name in ("cache", "dynamics") if getattr(config, name) is not None)
        self._recipes = _recipes(config, files, given)
        for recipe in self._recipes:
            if not recipe.rule:
                for fraction in config.fractions:
                    CHOOSERS[recipe.score].check(fraction)
        cache = None if config.cache is None else TeacherCache.open(config.cache, source=source)
        if cache is not None and (True in config.kd or any("cache" in r.inputs for r in self._recipes)):
            cache.require(np.arange(len(labels), dtype=np.int64))
        dynamics = None
        if config.dynamics is not None:
            dynamics = Dynamics.open(config.dynamics, labels=labels, fingerprint=fingerprint)
        self._subsets = Subsets(source, cache, dynamics, files, str(self._device))
        loader = make_loader(source.train, config.loader, self._device)
        plain = Opened(source, loader, normalization_of(source.train), TeacherSide())
        self._opened = {False: plain, True: dataclasses.replace(plain, side=TeacherSide(cache))}
        for kd in config.kd:
            # Refuses more views than there are.
            assemble(self._opened[kd], config.run_config(1, seed=0), np.arange(1), device=self._device)
        self._digests: dict[str, Any] = {
            "cache": self._opened[True].side.identity(),
            "dynamics": None if dynamics is None else dynamics.digest,
            **{f"scores {name}": file.digest for name, file in files.items()},
        }

    def _check_sizes(self) -> None:
        labels, run = self._source.train.labels, self.config.run
        for fraction in self.config.fractions:
            samples = subset_size(len(labels), fraction)
            class_budgets(labels, samples)
            if samples < run["batch_size"]:
                raise SubsetError(
                    f"--fractions {fraction:g} keeps {samples} of {len(labels)} samples, fewer than one batch of "
                    f"{run['batch_size']}: keep more or lower --batch-size"
                )
            check_student(self.config.run_config(samples, seed=0), samples, self._source, Ranks())

    def cells(self) -> list[Cell]:
        """The grid, in the order in which it is run: seed by seed, so that a whole table is there early."""
        config = self.config
        return [
            Cell(recipe, fraction, kd, seed, self._settings(recipe, fraction, kd, seed))
            for seed in config.seeds
            for fraction in config.fractions
            for recipe in self._recipes
            for kd in config.kd
        ]

    def samples(self, fraction: float) -> int:
        """How many samples a fraction keeps."""
        return subset_size(len(self._source.train), fraction)

    def _settings(self, recipe: Recipe, fraction: float, kd: bool, seed: int) -> dict[str, Any]:
        return {
            **self.config.protocol(kd),
            "data": self._source.fingerprint,
            "method": str(recipe),
            "fraction": fraction,
            "kd": kd,
            "seed": seed,
            "cache": self._digests["cache"] if kd else None,
            **({"scores": {name: self._digests[name] for name in sorted(recipe.inputs)}} if recipe.inputs else {}),
        }

    def run(self, cell: Cell, out: Path, *, advance: Advance | None = None) -> dict[str, Any]:
        """Choose the subset, train the student, evaluate it.

        Args:
            cell: The run.
            out: The sweep's folder; the run's own is in it, and is gone on with if the run was interrupted.
            advance: Told how far the run is.

        Returns:
            The row.

        Raises:
            DivergedError: If the loss is not finite.
            Interrupted: After SIGTERM or Ctrl-C, with the state saved.
            OutputError: If the folder cannot be written.
        """
        runs = check_writable(out / RUNS)
        state = runs / f"{cell.key[:16]}.search"
        chosen = self._subsets.choose(cell.recipe, cell.fraction, cell.seed, state=state, progress=advance)
        plan = self._plan(cell, chosen.ids)
        identity = {**plan.identity, "key": cell.key}
        folder = runs / f"{cell.key[:16]}-{plan.identity['subset'][:8]}"
        with RunFolder(folder, identity, facts=plan.facts) as claimed:
            result = train(plan, claimed, Watch(advance=advance))
        return {
            "key": cell.key,
            "method": str(cell.recipe),
            "fraction": cell.fraction,
            "kd": cell.kd,
            "seed": cell.seed,
            "student": plan.config.student,
            "epochs": plan.config.epochs,
            **{name: result[name] for name in _FROM_RESULT},
            "subset": plan.identity["subset"],
            "subset_seconds": round(chosen.seconds, 3),
            **({"chosen": chosen.facts} if chosen.facts else {}),
            "settings": cell.settings,
            "kdfast": kdfast.__version__,
        }

    def clear(self, cell: Cell, out: Path, *, keep: bool) -> None:
        """Remove what a run needed to be gone on with, once its row is written.

        Args:
            cell: The run.
            out: The sweep's folder.
            keep: Leave the run's folder, with the student in it.
        """
        for place in (out / RUNS).glob(f"{cell.key[:16]}*"):
            if place.is_file():
                place.unlink()
            elif not keep:
                shutil.rmtree(place)

    def _plan(self, cell: Cell, ids: IntArray) -> Plan:
        alpha = parse_alpha(self.config.alpha, len(ids) / len(self._source.train)) if cell.kd else 0.0
        config = self.config.run_config(len(ids), seed=cell.seed, alpha=alpha)
        return assemble(self._opened[cell.kd], config, ids, device=self._device)


def _recipes(config: SweepConfig, files: dict[str, ScoreFile], given: frozenset[str]) -> list[Recipe]:
    recipes: list[Recipe] = []
    for spec in config.methods:
        recipe = make_recipe(spec, files, given)
        if recipe in recipes:
            raise UsageError(f"--methods names {recipe} twice, once as {spec}; give it once")
        recipes.append(recipe)
    return recipes


_FROM_RESULT = ("steps", "kept", "alpha", "views", "test_top1", "test_top5", "test_loss", "seconds", "weights")
