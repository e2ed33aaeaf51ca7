"""What the runs of a study share: teachers, dynamics, subsets and caches, each made once, under a lock, in its folder.

    teachers/NET-SHARE-DIGEST.pt        a teacher, given or trained; T.pt.run is its run, T.pt.subset.npy its samples
    teachers/T-flat-DIGEST.pt           the same, flattened, for influence over all weights
    dynamics/DIGEST                     recorded dynamics
    outputs/TEACHER                     a teacher's outputs on every sample, for methods
    subsets/DIGEST.npy                  the samples of a cell and seed
    caches/TEACHER-DIGEST               a teacher's outputs on all views of a subset, for the loss; deleted after use

A name contains the digest of everything that determines the content, so that studies and machines can share a folder.
An interrupted process leaves what it has done, and the next one resumes there. Everything is checked by the code that
opens it, as in other commands. Threads that train on one GPU hold `EXCLUSIVE` for all of it but the trainings, which
take it themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import Subset, class_budgets, subset_size, write_subset
from kdfast.distillation.config import RunConfig
from kdfast.distillation.cuda_graph import EXCLUSIVE
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.inputs import check_student
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.record_dynamics import RecordingConfig, check_recording, record_dynamics
from kdfast.distillation.train import Monitoring, train
from kdfast.dynamics import format as dynamics_format
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import SubsetError
from kdfast.estimates import measure_cache
from kdfast.files import make_subfolder, sha256_json
from kdfast.files.space import check_space
from kdfast.nets.checkpoint import Model, load_model, save_model
from kdfast.nets.fit import check_fit
from kdfast.progress import Progress
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.select import SelectionMethod, SubsetPipeline
from kdfast.reproduction.cells import Cell, resolve
from kdfast.reproduction.engine.locks import hold
from kdfast.reproduction.engine.teachers import TEACHER_SEED, TeacherSpec, plain_name
from kdfast.reproduction.study import Study
from kdfast.reproduction.study_file import RECORDING_FIELDS
from kdfast.sweep.work import Postponed, stoppable
from kdfast.teacher.build import build_cache, row_format
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.evaluate import evaluate
from kdfast.teacher.flatten import FlattenConfig, flatten_teacher
from kdfast.teacher.manifest import MANIFEST
from kdfast.teacher.plan import delete_cache
from kdfast.teacher.predictor import Precision


class Artifacts:
    """The artefacts of a study's folder.

    Args:
        out: The folder.
        study: The study.
        inputs: The data, without a teacher.
        device: Where to compute.
        precision: Of training and of caches.
        recipe: Settings of the training of a network as a teacher, but its name; fields of `RunConfig`.
        recording: Settings of the training of the recorded network; fields of `RunConfig` with its name.
        given: Teachers of files, by network.
        dynamics: Recorded dynamics to use in place of those of the folder.
    """

    def __init__(
        self,
        out: Path,
        study: Study,
        inputs: LoadedInputs,
        device: torch.device,
        precision: str,
        *,
        recipe: dict[str, Any],
        recording: dict[str, Any],
        given: dict[str, Model],
        dynamics: Dynamics | None,
    ) -> None:
        self.out, self._study, self._inputs = out, study, inputs
        self._device, self._precision = device, precision
        self._recipe, self._given, self._given_dynamics = recipe, given, dynamics
        self._recorded = RunConfig(**recording, precision=precision)
        fields = {name: study.dynamics[name] for name in RECORDING_FIELDS if name in study.dynamics}
        self._recording = RecordingConfig(**fields)
        self._pipelines: dict[Any, SubsetPipeline] = {}
        self._models: dict[str, Model] = {}

    @property
    def _source(self) -> Source:
        return self._inputs.source

    # What identifies artefacts, known before they exist.

    def teacher_spec(self, cell: Cell) -> TeacherSpec:
        """Return what is known of the teacher of a cell that has one."""
        net, fraction = cell.teacher, cell.teacher_fraction
        assert net is not None, "the cell has a teacher"
        assert fraction is not None, "so it has its share of the data"
        if fraction == 1 and net in self._given:
            model = self._given[net]
            statistics = dataclasses.asdict(model.normalization)
            return TeacherSpec(net, 1.0, {"net": net, "digest": model.digest, **statistics}, model)
        config = self._teacher_config(net)
        return TeacherSpec(
            net, fraction, {"trained": config.to_dict(), "fraction": fraction, "data": self._source.fingerprint}
        )

    def dynamics_identity(self) -> dict[str, Any]:
        """Return what determines the recorded dynamics, JSON values."""
        if self._given_dynamics is not None:
            return {"digest": self._given_dynamics.digest}
        recording = dataclasses.asdict(self._recording)
        return {"trained": self._recorded.to_dict(), "recording": recording, "data": self._source.fingerprint}

    def method_identity(self, cell: Cell) -> dict[str, Any]:
        """Return what determines the scores and the samples of a cell beside method, fraction and seed; JSON values."""
        method = resolve(cell.method)
        identity: dict[str, Any] = dict(method.fixed)
        if "dynamics" in method.inputs:
            identity["dynamics"] = self.dynamics_identity()
        if method.inputs & {"cache", "teacher"}:
            identity["teacher"] = self.teacher_spec(cell).identity
        if "cache" in method.inputs:
            identity["cache"] = {"views": self._study.cache_views, "precision": self._cache_precision}
        if "teacher" in method.inputs:
            identity["flattened"] = dataclasses.asdict(FlattenConfig())
        if cell.disjoint:
            identity["excluded"] = {"fraction": cell.teacher_fraction, "seed": TEACHER_SEED}
        return identity

    def subset_path(self, cell: Cell, seed: int) -> Path | None:
        """Return the file of a cell's samples; None for all samples."""
        if cell.fraction == 1:
            return None
        identity = {"method": cell.method, "fraction": cell.fraction, "seed": seed, "data": self._source.fingerprint}
        digest = sha256_json({**identity, **self.method_identity(cell)})[:12]
        return self.out / "subsets" / f"{plain_name(cell.method)}-{cell.fraction:g}-{seed}-{digest}.npy"

    def teacher_path(self, spec: TeacherSpec) -> Path:
        """Return the file of a teacher."""
        return self.out / "teachers" / f"{spec.name}.pt"

    def dynamics_path(self) -> Path:
        """Return the folder of the dynamics."""
        if self._given_dynamics is not None:
            return self._given_dynamics.path
        return self.out / "dynamics" / sha256_json(self.dynamics_identity())[:12]

    def cache_path(self, cell: Cell, seed: int, views: int) -> Path:
        """Return the folder of the cache of a cell's teacher and samples; 0 views: all."""
        subset = self.subset_path(cell, seed)
        part = "all" if subset is None else subset.stem.rpartition("-")[2]
        return self.out / "caches" / f"{self.teacher_spec(cell).name}-{part}-{views}-{self._cache_precision}"

    def missing(self, cell: Cell) -> dict[Path, tuple[str, int, int]]:
        """Return what must be made before a cell, but the cache of its samples, by the file that is then there.

        Returns:
            The network, the images it is trained on, and those that it only classifies.
        """
        method, samples = resolve(cell.method), len(self._source.train)
        found: dict[Path, tuple[str, int, int]] = {}
        if cell.kd or method.inputs & {"cache", "teacher"}:
            spec = self.teacher_spec(cell)
            images = (
                0 if spec.given is not None else round(spec.fraction * samples) * self._teacher_config(spec.net).epochs
            )
            found[self.teacher_path(spec)] = (spec.net, images, len(self._source.test))
            if "cache" in method.inputs:
                found[self._outputs_path(spec) / MANIFEST] = (spec.net, 0, samples * self._study.cache_views)
            if "teacher" in method.inputs:
                flatten = FlattenConfig()
                passes = flatten.iterations * flatten.batch_size * (1 if flatten.sharpness == "none" else 2)
                # With the gradient of each sample, which its score needs.
                found[self._flattened_path(spec)] = (spec.net, passes + samples, 0)
        if "dynamics" in method.inputs and self._given_dynamics is None:
            images = self._recorded.epochs * self._recording.runs * samples
            found[self.dynamics_path() / dynamics_format.MANIFEST] = (self._recorded.student, images, images)
        return {path: cost for path, cost in found.items() if not path.exists()}

    def trained_nets(self, cells: Iterable[Cell]) -> set[str]:
        """Return the networks that are trained before some cells: teachers, and the one whose dynamics are recorded."""
        return {network for cell in cells for network, images, _ in self.missing(cell).values() if images}

    def check(self, cells: Iterable[Cell]) -> None:
        """Check, before the work, that what is missing for cells can be trained, and their samples chosen.

        Raises:
            UsageError: A network does not exist or does not fit the data, or the recording does not.
            SubsetError: A teacher's share of the data is too small, or it leaves too few samples for the student's.
        """
        samples = len(self._source.train)
        checked: set[object] = set()
        for cell in cells:
            needs = resolve(cell.method).inputs
            if cell.kd or needs & {"cache", "teacher"}:
                spec = self.teacher_spec(cell)
                if spec.given is None and spec.name not in checked:
                    checked.add(spec.name)
                    kept = subset_size(samples, spec.fraction)
                    class_budgets(self._source.train.labels, kept)
                    check_student(self._teacher_config(spec.net), kept, self._source, self._device)
            if "dynamics" in needs and self._given_dynamics is None and "dynamics" not in checked:
                checked.add("dynamics")
                check_student(self._recorded, samples, self._source, self._device)
                check_recording(self._recorded, self._recording, self._source)
            place = (cell.fraction, cell.teacher_fraction)
            if cell.disjoint and place not in checked:
                checked.add(place)
                pipeline = SubsetPipeline(ScoreSources(self._source), exclude=self._excluded(cell))
                try:
                    pipeline.check(SelectionMethod("random", rule="hard"), cell.fraction)
                except SubsetError as error:
                    raise SubsetError(
                        f"a teacher on {cell.teacher_fraction:g} of the data leaves too few samples for a student on "
                        f"{cell.fraction:g}: leave these cells out with `restrict`, or lower a share in the study"
                    ) from error

    # The artefacts themselves, made where they are missing.

    def teacher(self, spec: TeacherSpec, progress: Progress | None = None) -> Model:
        """Return a teacher, imported or trained."""
        path = self.teacher_path(spec)
        self._make(path, path, functools.partial(self._make_teacher, spec, path), progress, f"teacher {spec.net}")
        with EXCLUSIVE:
            if spec.name not in self._models:
                model = load_model(path, net=spec.net)
                check_fit(model, self._source, str(path))
                self._models[spec.name] = model
            return self._models[spec.name]

    def teacher_samples(self, fraction: float) -> Subset | None:
        """Return the samples that a teacher is trained on; None for all."""
        if fraction == 1:
            return None
        method = SelectionMethod("random", rule="hard")
        selection = SubsetPipeline(ScoreSources(self._source)).select(method, fraction, TEACHER_SEED)
        return Subset(selection.ids, selection.provenance, None)

    def subset(self, cell: Cell, seed: int, progress: Progress | None = None) -> Path | None:
        """Return the file of a cell's samples; None for all samples."""
        path = self.subset_path(cell, seed)
        if path is not None:
            chosen = functools.partial(self._select, cell, seed, path)
            self._make(path, path, chosen, progress, f"subset {cell.method}")
        return path

    def cache(self, cell: Cell, seed: int, ids: IntArray, views: int, progress: Progress | None = None) -> Path:
        """Return the cache of a teacher's logits on views of a cell's samples, which are `ids`; 0 views: all."""
        spec, path = self.teacher_spec(cell), self.cache_path(cell, seed, views)
        if not (path / MANIFEST).exists():
            model = self.teacher(spec, progress)
            self._cache(model, path, ids, views or self._source.view_spec.count, progress)
        return path

    def use(self, path: Path) -> AbstractContextManager[bool]:
        """Try to keep other processes from deleting an artefact in the block; yields whether that succeeded."""
        return hold(self.out, str(path.relative_to(self.out)), shared=True)

    def delete_cache(self, path: Path) -> None:
        """Delete a cache that no other process uses."""
        with hold(self.out, str(path.relative_to(self.out))) as held:
            if held:
                delete_cache(path)
                shutil.rmtree(path, ignore_errors=True)  # the lock of the folder, which a cache leaves

    @property
    def _cache_precision(self) -> Precision:
        return "bfloat16" if self._precision == "bf16" else "float32"

    def _teacher_config(self, net: str) -> RunConfig:
        return RunConfig(student=net, **self._recipe, seed=TEACHER_SEED, precision=self._precision)

    def _make(
        self, path: Path, done: Path, make: Callable[[Progress | None], None], progress: Progress | None, name: str
    ) -> None:
        """Make an artefact unless the file `done` exists; raise Postponed while another process or thread makes it."""
        if done.exists():
            return
        make_subfolder(self.out, path.relative_to(self.out).parts[0])
        with hold(self.out, str(path.relative_to(self.out))) as held:
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
        samples = self.teacher_samples(spec.fraction)
        ids = np.arange(len(self._source.train), dtype=np.int64) if samples is None else samples.ids
        if samples is not None and samples.provenance is not None:
            write_subset(path.with_name(f"{path.name}.subset.npy"), samples.ids, samples.provenance)
        with EXCLUSIVE:
            plan = self._inputs.plan(self._teacher_config(spec.net), ids, device=self._device)
        with RunFolder(path.with_name(f"{path.name}.run"), plan.identity, metadata=plan.metadata) as folder:
            train(plan, folder, Monitoring(progress=progress))
            with EXCLUSIVE:
                save_model(path, load_model(folder.path / "student.pt", net=spec.net))

    def _record(self, path: Path, progress: Progress | None) -> None:
        record_dynamics(self._inputs, self._recorded, self._recording, path, device=self._device, progress=progress)

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
        key = sha256_json(self.method_identity(cell))
        pipeline = self._pipelines.get(key)
        if pipeline is None:
            model = cache = recorded = None
            if needs & {"cache", "teacher"}:
                spec = self.teacher_spec(cell)
                model = self.teacher(spec, progress)
                if "cache" in needs:
                    where = self._outputs_path(spec)
                    self._cache(model, where, None, self._study.cache_views, progress)
                    cache = TeacherCache.open(where, source=self._source)
            if "dynamics" in needs:
                recorded = self._dynamics(progress)
            network = self._flattened(cell, model, progress) if "teacher" in needs and model is not None else None
            sources = ScoreSources(self._source, cache, recorded, network)
            pipeline = SubsetPipeline(sources, device=str(self._device), exclude=self._excluded(cell))
            self._pipelines = {key: pipeline}
        return pipeline

    def _excluded(self, cell: Cell) -> IntArray | None:
        """Return the samples that must not be chosen for a cell, those of its teacher; None: any may be."""
        samples = self.teacher_samples(cell.teacher_fraction or 1.0) if cell.disjoint else None
        return None if samples is None else samples.ids

    def _dynamics(self, progress: Progress | None) -> Dynamics:
        if self._given_dynamics is not None:
            return self._given_dynamics
        path = self.dynamics_path()
        make = functools.partial(self._record, path)
        self._make(path, path / dynamics_format.MANIFEST, make, progress, "dynamics")
        return Dynamics.open(path, labels=self._source.train.labels, fingerprint=self._source.fingerprint)

    def _flattened(self, cell: Cell, model: Model, progress: Progress | None) -> Model:
        settings, path = FlattenConfig(), self._flattened_path(self.teacher_spec(cell))

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

    def _flattened_path(self, spec: TeacherSpec) -> Path:
        digest = sha256_json(dataclasses.asdict(FlattenConfig()))[:8]
        return self.out / "teachers" / f"{spec.name}-flat-{digest}.pt"

    def _outputs_path(self, spec: TeacherSpec) -> Path:
        return self.out / "outputs" / f"{spec.name}-{self._study.cache_views}-{self._cache_precision}"

    def _cache(self, model: Model, path: Path, ids: IntArray | None, views: int, progress: Progress | None) -> None:
        def make(report: Progress | None) -> None:
            samples = len(self._source.train) if ids is None else len(ids)
            rows = row_format(model, "float16")
            size = measure_cache(model, self._source, samples=samples, n_views=views, rows=rows)
            check_space(path, size.total + size.temporary, "the teacher's cache")
            build_cache(
                self._source, model, path, ids=ids, n_views=views, precision=self._cache_precision,
                device=self._device, progress=stoppable(report),
            )  # fmt: skip

        with EXCLUSIVE:
            self._make(path, path / MANIFEST, make, progress, f"cache of {model.name}")


def _named(progress: Progress, name: str) -> Progress:
    return lambda done, total, note: progress(done, total, f"{name}: {note}")
