"""The inputs of a sweep, opened once per process, and the execution of its runs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import kdfast
from kdfast.data.augment.presets import augment_source
from kdfast.data.loaders import make_loader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source, compute_normalization
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import class_budgets, subset_size
from kdfast.device import resolve_device
from kdfast.distillation.cuda_graph import EXCLUSIVE
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.inputs import check_student
from kdfast.distillation.plan import LoadedInputs, Plan
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.train import Monitoring, train
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import SubsetError, UsageError
from kdfast.files import make_subfolder, refuse_links
from kdfast.progress import Progress
from kdfast.pruning.own_scores import describe_scores
from kdfast.pruning.score_file import ScoreFile, open_scores
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.select import SubsetPipeline
from kdfast.sweep.costs import stage_seconds
from kdfast.sweep.grid import SweepConfig, SweepRun
from kdfast.sweep.parallel.shared import share_source
from kdfast.sweep.parallel.threads import can_train_in_threads
from kdfast.sweep.recipes import ResolvedMethod, resolve_method
from kdfast.sweep.results_log import RUNS
from kdfast.sweep.work import stoppable
from kdfast.teacher.cache import TeacherCache


class Session:
    """The inputs that the runs of a sweep share. Opening them checks as much as possible and writes nothing.

    Args:
        config: The settings of the sweep.
        source: The data, opened as the settings say; None: open it.

    Attributes:
        config: The settings of the sweep, with its views.
        given: The settings as given.
        device: Where the runs train.

    Raises:
        UsageError: A method is unknown or lacks an input, or settings contradict each other.
        DataError, CacheMismatch: An input is damaged or does not match the others.
        SubsetError: A fraction keeps too few samples.
    """

    def __init__(self, config: SweepConfig, source: Source | None = None) -> None:
        self.given, self.device = config, resolve_device(config.device)
        if source is None:
            source = open_source(config.data, size=config.size, order=config.order, split=config.split)
        self._opened = source
        if config.augment is not None:
            source, views = augment_source(source, config.augment, config.settings.get("views", 0))
            config = dataclasses.replace(config, settings={**config.settings, "views": views})
        self.config, self._source = config, source
        self._check_sizes()
        labels, fingerprint = source.train.labels, source.fingerprint
        self._files = files = {
            name: open_scores(path, source, key=config.key.get(name), higher=config.higher.get(name))
            for name, path in config.scores.items()
        }
        given = frozenset(name for name in ("cache", "dynamics") if getattr(config, name) is not None)
        self._recipes = _recipes(config, files, given)
        cache = None if config.cache is None else TeacherCache.open(config.cache, source=source)
        if cache is not None and (True in config.kd or any("cache" in r.inputs for r in self._recipes)):
            cache.check_covers(np.arange(len(labels), dtype=np.int64))
        dynamics = None
        if config.dynamics is not None:
            dynamics = Dynamics.open(config.dynamics, labels=labels, fingerprint=fingerprint)
        self._sources = ScoreSources(source, cache, dynamics)
        self._pipeline = SubsetPipeline(self._sources, files, device=str(self.device))
        for recipe in self._recipes:
            for fraction in config.fractions:
                self._pipeline.check(recipe.method, fraction)
        loader = make_loader(source.train, config.loader, self.device)
        plain = LoadedInputs(source, loader, compute_normalization(source.train), TeacherTargets())
        self._inputs = {False: plain, True: dataclasses.replace(plain, teacher=TeacherTargets(cache))}
        for kd in config.kd:
            # Refuse more views than exist, and terms that do not fit.
            self._plan_all(kd)
        self._digests: dict[str, Any] = {
            "cache": self._inputs[True].teacher.identity(),
            "dynamics": None if dynamics is None else dynamics.digest,
            **{f"scores {name}": file.digest for name, file in files.items()},
        }

    def _check_sizes(self) -> None:
        labels, batch_size = self._source.train.labels, self.config.settings["batch_size"]
        for fraction in self.config.fractions:
            samples = subset_size(len(labels), fraction)
            class_budgets(labels, samples)
            if samples < batch_size:
                raise SubsetError(
                    f"`fractions` contains {fraction:g}, which keeps {samples} of {len(labels)} samples, fewer than "
                    f"one batch of {batch_size}: raise the fraction or lower `batch_size`"
                )
            # Also refuses phases of the loss that are longer than the run.
            settings = [self.config.run_config(samples, seed=0, kd=kd) for kd in self.config.kd]
            check_student(settings[0], samples, self._source, self.device)

    def runs(self) -> list[SweepRun]:
        """Return the grid in the order it is run: seed by seed, so that a complete table exists early."""
        config = self.config
        return [
            SweepRun(recipe, fraction, kd, seed, self._settings(recipe, fraction, kd, seed))
            for seed in config.seeds
            for fraction in config.fractions
            for recipe in self._recipes
            for kd in config.kd
        ]

    def _plan_all(self, kd: bool) -> Plan:
        """Plan a run on all samples."""
        ids = np.arange(len(self._source.train), dtype=np.int64)
        return self._inputs[kd].plan(self.config.run_config(1, seed=0, kd=kd), ids, device=self.device)

    def divide_device(self, jobs: int) -> bool:
        """Return whether threads can train at the same time on the GPU, and divide its memory among so many runs.

        See `kdfast.sweep.parallel.threads.can_train_in_threads`.
        """
        if not all(can_train_in_threads(self._plan_all(kd)) for kd in self.config.kd):
            return False
        inputs = self._inputs[True]
        self._inputs[True] = dataclasses.replace(inputs, teacher=dataclasses.replace(inputs.teacher, runs=jobs))
        return True

    def share(self) -> Source | None:
        """Return the data for the sessions of other processes, see `kdfast.sweep.parallel.shared.share_source`."""
        return share_source(self._opened, self._inputs[False].loader)

    @property
    def source(self) -> Source:
        """The data, with the augmentation of the sweep."""
        return self._source

    def describe_scores(self) -> list[str]:
        """Return how each score file of another program was read, one line each."""
        lines = (describe_scores(file.method, file.parameters) for file in self._files.values())
        return [line for line in lines if line is not None]

    def count_samples(self, fraction: float) -> int:
        """Return how many samples a fraction keeps."""
        return subset_size(len(self._source.train), fraction)

    def _settings(self, recipe: ResolvedMethod, fraction: float, kd: bool, seed: int) -> dict[str, Any]:
        cut = self.config.run_config(self.count_samples(fraction), seed=seed).steps is not None
        # In a table, a row whose `scores` differ replaces the older row of the same method.
        scores = {name: self._digests[name] for name in sorted(recipe.inputs)} | dict(recipe.fixed)
        return {
            **self.config.shared_settings(kd),
            "data": self._source.fingerprint,
            "method": str(recipe),
            "fraction": fraction,
            "kd": kd,
            "seed": seed,
            "cache": self._digests["cache"] if kd else None,
            **({"scores": scores} if scores else {}),
            # Rows of earlier versions, whose steps were rounded to whole epochs, are other rows.
            **({"cut": True} if cut else {}),
        }

    def execute(self, run: SweepRun, out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
        """Select the subset, train the student on it and evaluate it; resume the run if it was interrupted.

        Args:
            run: The run.
            out: Folder of the sweep, which contains the folder of the run.
            progress: Called with (step, steps, status).

        Returns:
            The row of the run.

        Raises:
            DivergedError: The loss is not finite.
            Interrupted: SIGTERM or Ctrl-C; the state is saved.
            OutputError: The folder cannot be written.
        """
        runs = make_subfolder(out, RUNS)
        state = runs / f"{run.key[:16]}.search"
        with EXCLUSIVE:
            selection = self._pipeline.select(
                run.recipe.method, run.fraction, run.seed, state=state, progress=stoppable(progress)
            )
            plan = self._plan(run, selection.ids)
        identity = {**plan.identity, "key": run.key}
        folder = refuse_links(runs, f"{run.key[:16]}-{plan.identity['subset'][:8]}")
        with RunFolder(folder, identity, metadata=plan.metadata) as claimed:
            result = train(plan, claimed, Monitoring(progress=progress))
        return {
            "key": run.key,
            "method": str(run.recipe),
            "fraction": run.fraction,
            "kd": run.kd,
            "seed": run.seed,
            "student": plan.config.student,
            "epochs": None if plan.config.steps else plan.config.epochs,
            **{name: result[name] for name in _FROM_RESULT},
            "subset": plan.identity["subset"],
            "subset_seconds": round(selection.seconds, 3),
            "costs": stage_seconds(selection, self._sources, plan.config.views if run.kd else 0),
            **({"chosen": selection.details} if selection.details else {}),
            "settings": run.settings,
            "kdfast": kdfast.__version__,
        }

    def delete_checkpoints(self, run: SweepRun, out: Path, *, keep_runs: bool) -> None:
        """Delete the files that served to resume a run, once its row is written.

        Args:
            run: The run.
            out: Folder of the sweep.
            keep_runs: Whether to keep the folder of the run, which contains the student.
        """
        for place in refuse_links(out, RUNS).glob(f"{run.key[:16]}*"):
            if place.is_symlink() or place.is_file():
                place.unlink()
            elif not keep_runs:
                shutil.rmtree(place)

    def _plan(self, run: SweepRun, ids: IntArray) -> Plan:
        alpha = self.config.alpha_at(len(ids) / len(self._source.train)) if run.kd else 0.0
        config = self.config.run_config(len(ids), seed=run.seed, alpha=alpha, kd=run.kd)
        return self._inputs[run.kd].plan(config, ids, device=self.device)


def _recipes(config: SweepConfig, files: dict[str, ScoreFile], given: frozenset[str]) -> list[ResolvedMethod]:
    recipes: list[ResolvedMethod] = []
    for spec in config.methods:
        recipe = resolve_method(spec, files, given)
        if recipe in recipes:
            raise UsageError(f"`methods` names {recipe} twice, once as {spec}: name it once")
        recipes.append(recipe)
    return recipes


_FROM_RESULT = ("steps", "kept", "alpha", "views", "test_top1", "test_top5", "test_loss", "seconds", "weights")
