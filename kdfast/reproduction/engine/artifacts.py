"""What the runs of a study share: teachers, dynamics, subsets and caches, each made once, under a lock.

An interrupted process leaves what it has done, and the next one resumes there. Everything is checked by the code that
opens it, as in other commands. Threads that train on one GPU hold `EXCLUSIVE` for all of it but the trainings, which
take it themselves.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import write_subset
from kdfast.distillation.cuda_graph import EXCLUSIVE
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.record_dynamics import record_dynamics
from kdfast.distillation.train import Monitoring, train
from kdfast.dynamics import format as dynamics_format
from kdfast.dynamics.reader import Dynamics
from kdfast.estimates import measure_cache
from kdfast.files import make_subfolder, sha256_json
from kdfast.files.space import check_space
from kdfast.nets.checkpoint import Model, load_model, save_model
from kdfast.nets.fit import check_fit
from kdfast.progress import Progress
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.select import SubsetPipeline
from kdfast.reproduction.cells import Cell, resolve
from kdfast.reproduction.engine.locks import hold
from kdfast.reproduction.engine.places import Places
from kdfast.reproduction.engine.teachers import TeacherSpec, excluded_samples, teacher_samples
from kdfast.sweep.work import Postponed, stoppable
from kdfast.teacher.build import build_cache, row_format
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.evaluate import evaluate
from kdfast.teacher.flatten import flatten_teacher
from kdfast.teacher.manifest import MANIFEST
from kdfast.teacher.plan import delete_cache


class Artifacts:
    """The artefacts of a study's folder, made where they are missing.

    Args:
        places: Their files, and what determines them.
        inputs: The data, without a teacher.
        device: Where to compute.
    """

    def __init__(self, places: Places, inputs: LoadedInputs, device: torch.device) -> None:
        self._places, self._inputs, self._device = places, inputs, device
        self._pipelines: dict[str, SubsetPipeline] = {}
        self._models: dict[str, Model] = {}

    @property
    def _source(self) -> Source:
        return self._inputs.source

    def teacher(self, spec: TeacherSpec, progress: Progress | None = None) -> Model:
        """Return a teacher, imported or trained."""
        path = self._places.teacher_path(spec)
        self._make(path, path, functools.partial(self._make_teacher, spec, path), progress, f"teacher {spec.net}")
        with EXCLUSIVE:
            if spec.name not in self._models:
                model = load_model(path, net=spec.net)
                check_fit(model, self._source, str(path))
                self._models[spec.name] = model
            return self._models[spec.name]

    def subset(self, cell: Cell, seed: int, progress: Progress | None = None) -> Path | None:
        """Return the file of a cell's samples; None for all samples."""
        path = self._places.subset_path(cell, seed)
        if path is not None:
            chosen = functools.partial(self._select, cell, seed, path)
            self._make(path, path, chosen, progress, f"subset {cell.method}")
        return path

    def cache(self, cell: Cell, seed: int, ids: IntArray, views: int, progress: Progress | None = None) -> Path:
        """Return the cache of a teacher's logits on views of a cell's samples, which are `ids`; 0 views: all."""
        spec, path = self._places.teacher_spec(cell), self._places.cache_path(cell, seed, views)
        if not (path / MANIFEST).exists():
            model = self.teacher(spec, progress)
            self._cache(model, path, ids, views or self._source.view_spec.count, progress)
        return path

    def use(self, path: Path) -> AbstractContextManager[bool]:
        """Try to keep other processes from deleting an artefact in the block; yields whether that succeeded."""
        return self._lock(path, shared=True)

    def delete_cache(self, path: Path) -> None:
        """Delete a cache that no other process uses."""
        with self._lock(path) as held:
            if held:
                delete_cache(path)
                shutil.rmtree(path, ignore_errors=True)  # the lock of the folder, which a cache leaves

    def _lock(self, path: Path, *, shared: bool = False) -> AbstractContextManager[bool]:
        return hold(self._places.out, str(path.relative_to(self._places.out)), shared=shared)

    def _make(
        self, path: Path, done: Path, make: Callable[[Progress | None], None], progress: Progress | None, name: str
    ) -> None:
        """Make an artefact unless the file `done` exists; raise Postponed while another process or thread makes it."""
        if done.exists():
            return
        make_subfolder(self._places.out, path.relative_to(self._places.out).parts[0])
        with self._lock(path) as held:
            if not held:
                raise Postponed
            if not done.exists():
                make(None if progress is None else _named(progress, name))

    def _make_teacher(self, spec: TeacherSpec, path: Path, progress: Progress | None) -> None:
        if spec.given is not None:
            model = spec.given
            with EXCLUSIVE:
                scores = evaluate(model, self._source.test, device=self._device, view_spec=self._source.view_spec)
            model.metadata.update({"test_top1": scores["top1"], "test_top5": scores["top5"]})
            save_model(path, model)
            return
        samples = teacher_samples(self._source, spec.fraction)
        ids = np.arange(len(self._source.train), dtype=np.int64) if samples is None else samples.ids
        if samples is not None and samples.provenance is not None:
            write_subset(path.with_name(f"{path.name}.subset.npy"), samples.ids, samples.provenance)
        with EXCLUSIVE:
            plan = self._inputs.plan(self._places.teacher_config(spec.net), ids, device=self._device)
        with RunFolder(path.with_name(f"{path.name}.run"), plan.identity, metadata=plan.metadata) as folder:
            train(plan, folder, Monitoring(progress=progress))
            with EXCLUSIVE:
                save_model(path, load_model(folder.path / "student.pt", net=spec.net))

    def _record(self, path: Path, progress: Progress | None) -> None:
        record_dynamics(
            self._inputs, self._places.recorded, self._places.recording, path, device=self._device, progress=progress
        )

    def _select(self, cell: Cell, seed: int, path: Path, progress: Progress | None) -> None:
        pipeline = self._pipeline(cell, progress)
        state = path.with_suffix(".search")
        method = resolve(cell.method).method
        with EXCLUSIVE:
            selection = pipeline.select(method, cell.fraction, seed, state=state, progress=stoppable(progress))
        write_subset(path, selection.ids, selection.provenance)
        state.unlink(missing_ok=True)

    def _pipeline(self, cell: Cell, progress: Progress | None) -> SubsetPipeline:
        """Return the selection of a cell, with what its method is computed from; kept for cells that share it."""
        needs = resolve(cell.method).inputs
        key = sha256_json(self._places.method_identity(cell))
        pipeline = self._pipelines.get(key)
        if pipeline is None:
            model = cache = recorded = None
            if needs & {"cache", "teacher"}:
                spec = self._places.teacher_spec(cell)
                model = self.teacher(spec, progress)
                if "cache" in needs:
                    where = self._places.outputs_path(spec)
                    self._cache(model, where, None, self._places.cache_views, progress)
                    cache = TeacherCache.open(where, source=self._source)
            if "dynamics" in needs:
                recorded = self._dynamics(progress)
            network = self._flattened(cell, model, progress) if "teacher" in needs and model is not None else None
            sources = ScoreSources(self._source, cache, recorded, network)
            pipeline = SubsetPipeline(sources, device=str(self._device), exclude=excluded_samples(self._source, cell))
            self._pipelines = {key: pipeline}
        return pipeline

    def _dynamics(self, progress: Progress | None) -> Dynamics:
        if self._places.given_dynamics is not None:
            return self._places.given_dynamics
        path = self._places.dynamics_path()
        make = functools.partial(self._record, path)
        self._make(path, path / dynamics_format.MANIFEST, make, progress, "dynamics")
        return Dynamics.open(path, labels=self._source.train.labels, fingerprint=self._source.fingerprint)

    def _flattened(self, cell: Cell, model: Model, progress: Progress | None) -> Model:
        settings, path = self._places.flattening, self._places.flattened_path(self._places.teacher_spec(cell))

        def make(report: Progress | None) -> None:
            state = path.with_name(f"{path.name}.state")
            flat = flatten_teacher(
                model, self._source, settings, state=state, progress=stoppable(report), device=self._device
            )
            save_model(path, flat)
            state.unlink(missing_ok=True)

        with EXCLUSIVE:
            self._make(path, path, make, progress, "flatten")
            return load_model(path, net=model.name)

    def _cache(self, model: Model, path: Path, ids: IntArray | None, views: int, progress: Progress | None) -> None:
        def make(report: Progress | None) -> None:
            samples = len(self._source.train) if ids is None else len(ids)
            rows = row_format(model, "float16")
            size = measure_cache(model, self._source, samples=samples, n_views=views, rows=rows)
            check_space(path, size.total + size.temporary, "the teacher's cache")
            build_cache(
                self._source, model, path, ids=ids, n_views=views, precision=self._places.cache_precision,
                device=self._device, progress=stoppable(report),
            )  # fmt: skip

        with EXCLUSIVE:
            self._make(path, path / MANIFEST, make, progress, f"cache of {model.name}")


def _named(progress: Progress, name: str) -> Progress:
    return lambda done, total, note: progress(done, total, f"{name}: {note}")
