"""The inputs of a reproduction, opened once per process, and the execution of its runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kdfast
from kdfast.data.loaders import make_loader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source, compute_normalization
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import open_subset, subset_size
from kdfast.device import resolve_device
from kdfast.distillation.config import RunConfig
from kdfast.distillation.cuda_graph import EXCLUSIVE
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.inputs import open_targets
from kdfast.distillation.losses.alpha import parse_alpha
from kdfast.distillation.plan import LoadedInputs, Plan
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.train import Monitoring, train
from kdfast.dynamics.reader import Dynamics
from kdfast.files import make_subfolder, refuse_links, sha256_json
from kdfast.progress import Progress
from kdfast.reproduction.axes import RECIPE_DEFAULTS, RECIPE_FIELDS
from kdfast.reproduction.cells import Cell
from kdfast.reproduction.engine.artifacts import Artifacts
from kdfast.reproduction.engine.checks import check_artifacts, check_students, check_terms
from kdfast.reproduction.engine.command import distill_command
from kdfast.reproduction.engine.config import ReproductionConfig
from kdfast.reproduction.engine.machine import describe_machine
from kdfast.reproduction.engine.places import Places
from kdfast.reproduction.engine.targets import CACHE, choose_targets
from kdfast.reproduction.engine.teachers import read_given
from kdfast.reproduction.selection import compress, compressed_epochs
from kdfast.sweep.parallel.shared import share_source
from kdfast.sweep.parallel.threads import can_train_in_threads
from kdfast.sweep.results_log import RUNS, ResultsLog
from kdfast.sweep.work import Postponed
from kdfast.teacher.manifest import MANIFEST

_FROM_RESULT = ("test_top1", "test_top5", "steps", "images", "seconds", "kept", "alpha", "views", "targets", "weights")


@dataclass(frozen=True)
class StudyRun:
    """One run: a cell with a seed.

    Attributes:
        cell: The cell.
        label: The cell for people, by the axes in which the study's cells differ.
        seed: The seed.
        epochs: Its epochs.
        targets: Where the teacher's logits come from, a value of `choose_targets`.
        settings: Everything that determines the result, including what identifies the inputs; JSON values.
    """

    cell: Cell
    label: str
    seed: int
    epochs: int
    targets: str | None
    settings: dict[str, Any] = field(hash=False)

    @property
    def key(self) -> str:
        """SHA-256 (hexadecimal) of the settings; rows with equal keys are the same row."""
        return sha256_json(self.settings)

    def __str__(self) -> str:
        """Return the cell and the seed, for people."""
        return f"{self.label}, seed {self.seed}"


class ReproductionSession:
    """The inputs that the runs share. Opening them checks as much as possible and writes nothing.

    Args:
        config: What to run.
        source: The data, if they are open already; see `share`.

    Attributes:
        config: What to run.
        source: The data.
        device: Where to compute.
        places: Where what the runs share lies in the folder.
        artifacts: What makes it.

    Raises:
        UsageError: Settings do not fit each other.
        DataError, CheckpointError: An input is damaged or does not fit the others.
        SubsetError: A fraction keeps too few samples.
    """

    def __init__(self, config: ReproductionConfig, source: Source | None = None) -> None:
        self.config = config
        self.device: torch.device = resolve_device(config.device)
        if source is None:
            source = open_source(config.data, size=config.size, order=config.order, split=config.split)
        self.source, study = source, config.study
        check_students(config, source, self.device)
        used = {cell.teacher for cell in config.cells if cell.teacher is not None and cell.teacher_fraction == 1}
        given = read_given(config.teachers, used, source, config.normalization)
        recorded = None
        if config.dynamics is not None:
            recorded = Dynamics.open(config.dynamics, labels=source.train.labels, fingerprint=source.fingerprint)
        self._inputs = LoadedInputs(
            source,
            make_loader(source.train, config.loader, self.device),
            compute_normalization(source.train),
            TeacherTargets(),
        )
        self.places = Places(
            config.out,
            study,
            source,
            config.precision,
            recipe=self._shorten(study.teachers),
            recording={"student": study.dynamics["net"], **_recipe_of(study.dynamics)},
            given=given,
            dynamics=recorded,
        )
        self.artifacts = Artifacts(self.places, self._inputs, self.device)
        self._at_a_time = 1
        check_artifacts(self.places, config.cells, source, self.device)
        check_terms(config, self._inputs, self.device)

    def divide_device(self, jobs: int) -> bool:
        """Return whether threads can train at the same time on the GPU, and divide its memory among so many runs.

        See `kdfast.sweep.parallel.threads.can_train_in_threads`.
        """
        cells, ids = self.config.cells, np.arange(len(self.source.train), dtype=np.int64)
        nets = {cell.student for cell in cells} | self.places.trained_nets(cells)
        configs = (RunConfig(net, precision=self.config.precision) for net in sorted(nets))
        if not all(can_train_in_threads(self._inputs.plan(config, ids, device=self.device)) for config in configs):
            return False
        self._at_a_time = jobs
        return True

    def share(self) -> Source | None:
        """Return the data for the sessions of other processes, see `share_source`."""
        return share_source(self.source, self._inputs.loader)

    def _shorten(self, recipe: dict[str, Any]) -> dict[str, Any]:
        epochs = compress(self.config.study, int(recipe.get("epochs") or RECIPE_DEFAULTS["epochs"]), self.config.epochs)
        return {**recipe, "epochs": epochs}

    def _run_config(self, cell: Cell, seed: int) -> RunConfig:
        return self.config.run_config(cell, seed, len(self.source.train))

    def runs(self) -> list[StudyRun]:
        """Return the runs in their order: seed by seed, so that every cell has a row early."""
        return self._runs

    @functools.cached_property
    def _runs(self) -> list[StudyRun]:
        return [self._run(cell, seed) for seed in self.config.seeds for cell in self.config.cells]

    def _run(self, cell: Cell, seed: int) -> StudyRun:
        config, study = self._run_config(cell, seed), self.config.study
        targets = choose_targets(study, cell, self.source, config, self.config.epochs)
        settings: dict[str, Any] = {
            **config.to_dict(),
            "alpha": cell.alpha if cell.kd else 0,
            "method": cell.method,
            "fraction": cell.fraction,
            "disjoint": cell.disjoint,
            "data": self.source.fingerprint,
            "inputs": self.places.method_identity(cell),
            "targets": targets,
            "teacher": None,
        }
        own = compressed_epochs(study, cell, None, len(self.source.train))
        if self.config.epochs is not None and config.epochs == own:
            settings["compressed_to"] = self.config.epochs  # else the row would be that of the full schedule
        if cell.kd:
            settings["teacher"] = self.places.teacher_spec(cell).identity
        return StudyRun(cell, study.label(cell), seed, config.epochs, targets, settings)

    def execute(self, run: StudyRun, out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
        """Make what the run needs, train its student and evaluate it; resume what was interrupted.

        Args:
            run: The run.
            out: Folder of the reproduction, which contains the folder of the run.
            progress: Called with (step, steps, status).

        Returns:
            The row of the run.

        Raises:
            DivergedError: The loss is not finite.
            Interrupted: SIGTERM or Ctrl-C; the state is saved.
            OutputError: The folder cannot be written.
            Postponed: Another process makes what the run needs.
        """
        cell, subset = run.cell, self.artifacts.subset(run.cell, run.seed, progress)
        with self._cached(run, subset, progress) as cache:
            if cell.kd and cache is None:  # without the lock, because it may be trained
                self.artifacts.teacher(self.places.teacher_spec(cell), progress)
            with EXCLUSIVE:
                plan, paths = self._plan(run, subset, cache)
            folder = refuse_links(make_subfolder(out, RUNS), run.key[:16])
            with RunFolder(folder, plan.identity, metadata=plan.metadata) as claimed:
                result = train(plan, claimed, Monitoring(progress=progress))
        teacher = None
        if cell.kd:
            teacher = self.artifacts.teacher(self.places.teacher_spec(cell)).metadata.get("test_top1")
        return {
            "key": run.key,
            "study": self.config.study.name,
            "cell": cell.to_dict(),
            "seed": run.seed,
            "epochs": run.epochs,
            "compressed_to": self.config.epochs,
            "dataset": self.config.dataset or self.source.kind,
            "teacher_top1": teacher,
            **{name: result[name] for name in _FROM_RESULT},
            "precision": self.config.precision,
            "machine": describe_machine(self.device),
            "subset": plan.identity["subset"],
            "command": distill_command(plan, paths, folder, self.config),
            "settings": run.settings,
            "kdfast": kdfast.__version__,
            "torch": torch.__version__,
        }

    @contextlib.contextmanager
    def _cached(self, run: StudyRun, subset: Path | None, progress: Progress | None) -> Iterator[Path | None]:
        """Yield the cache of a run, which no other process deletes in the block; None if it has none."""
        if run.targets != CACHE:
            yield None
            return
        config = self._run_config(run.cell, run.seed)
        path = self.artifacts.cache(run.cell, run.seed, self._ids(subset, config), config.views, progress)
        with self.artifacts.use(path) as held:
            if not (held and path.exists()):
                raise Postponed
            yield path

    def _ids(self, subset: Path | None, config: RunConfig) -> IntArray:
        if subset is None:
            return np.arange(len(self.source.train), dtype=np.int64)
        return open_subset(subset, self.source, batch_size=config.batch_size).ids

    def _plan(self, run: StudyRun, subset: Path | None, cache: Path | None) -> tuple[Plan, dict[str, Path]]:
        """Return the plan of a run, whose teacher exists, and the paths of its inputs by option of `kdfast distill`."""
        cell, config = run.cell, self._run_config(run.cell, run.seed)
        ids, targets = self._ids(subset, config), TeacherTargets()
        paths = {} if subset is None else {"subset": subset}
        if cell.kd:
            most = 1.0 if config.ce is None else float("inf")
            alpha = parse_alpha(str(cell.alpha), len(ids) / len(self.source.train), most)
            config = dataclasses.replace(config, alpha=alpha)
            if cache is not None:
                paths["cache"], targets = cache, open_targets(self.source, ids, cache, None)
            else:
                spec = self.places.teacher_spec(cell)
                paths["teacher"] = self.places.teacher_path(spec)
                targets = TeacherTargets(model=self.artifacts.teacher(spec))
        inputs = dataclasses.replace(self._inputs, teacher=dataclasses.replace(targets, runs=self._at_a_time))
        metadata = {"data": self.config.data, **{name: str(path) for name, path in paths.items()}}
        return inputs.plan(config, ids, device=self.device, metadata=metadata), paths

    def delete_checkpoints(self, run: StudyRun, out: Path, *, keep_runs: bool) -> None:
        """Delete the folder of a run, once its row is written, and its cache if no other of these runs needs it.

        Args:
            run: The run.
            out: Folder of the reproduction.
            keep_runs: Whether to keep both.
        """
        if keep_runs:
            return
        folder = refuse_links(out, RUNS) / run.key[:16]
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        cache = self._cache_path(run)
        if cache is not None and cache.exists():
            done = ResultsLog(out).done()
            if all(other.key in done for other in self.runs() if self._cache_path(other) == cache):
                self.artifacts.delete_cache(cache)

    def _cache_path(self, run: StudyRun) -> Path | None:
        if run.targets != CACHE:
            return None
        return self.places.cache_path(run.cell, run.seed, self._run_config(run.cell, run.seed).views)

    def missing(self, run: StudyRun) -> dict[Path, tuple[str, int, int]]:
        """Return what must be made before a run, see `Places.missing`."""
        found, cache = self.places.missing(run.cell), self._cache_path(run)
        if cache is not None and not (cache / MANIFEST).exists():
            views = self._run_config(run.cell, run.seed).views or self.source.view_spec.count
            kept = subset_size(len(self.source.train), run.cell.fraction)
            found[cache / MANIFEST] = (str(run.cell.teacher), 0, kept * views)
        return found


def _recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in RECIPE_FIELDS}
