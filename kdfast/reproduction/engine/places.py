"""Where the artefacts of a study lie and what determines them, both known before they exist.

    teachers/NET-SHARE-DIGEST.pt        a teacher, given or trained; T.pt.run is its run, T.pt.subset.npy its samples
    teachers/T-flat-DIGEST.pt           the same, flattened, for influence over all weights
    dynamics/DIGEST                     recorded dynamics
    outputs/TEACHER                     a teacher's outputs on every sample, for methods
    subsets/DIGEST.npy                  the samples of a cell and seed
    caches/TEACHER-DIGEST               a teacher's outputs on all views of a subset, for the loss; deleted after use

A name contains the digest of everything that determines the content, so that studies and machines can share a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdfast.data.source import Source
from kdfast.distillation.config import RunConfig
from kdfast.distillation.record_dynamics import RecordingConfig
from kdfast.dynamics import format as dynamics_format
from kdfast.dynamics.reader import Dynamics
from kdfast.files import sha256_json
from kdfast.nets.checkpoint import Model
from kdfast.reproduction.cells import Cell, resolve
from kdfast.reproduction.engine.teachers import TEACHER_SEED, TeacherSpec, plain_name
from kdfast.reproduction.study import Study
from kdfast.reproduction.study_file import RECORDING_FIELDS
from kdfast.teacher.flatten import FlattenConfig
from kdfast.teacher.manifest import MANIFEST
from kdfast.teacher.predictor import Precision


class Places:
    """The files of a study's artefacts, and what identifies each.

    Args:
        out: The folder.
        study: The study.
        source: The data.
        precision: Of training and of caches.
        recipe: Settings of the training of a network as a teacher, but its name; fields of `RunConfig`.
        recording: Settings of the training of the recorded network; fields of `RunConfig` with its name.
        given: Teachers of files, by network.
        dynamics: Recorded dynamics to use in place of those of the folder.

    Attributes:
        out: The folder.
        cache_views: Views of the teacher's outputs that methods read.
        recorded: Training of the recorded network.
        recording: What is recorded of it.
        flattening: How teachers are flattened.
        given_dynamics: As `dynamics`.
    """

    def __init__(
        self,
        out: Path,
        study: Study,
        source: Source,
        precision: str,
        *,
        recipe: dict[str, Any],
        recording: dict[str, Any],
        given: dict[str, Model],
        dynamics: Dynamics | None,
    ) -> None:
        self.out, self.cache_views, self._source = out, study.cache_views, source
        self._precision, self._recipe, self._given = precision, recipe, given
        self.given_dynamics = dynamics
        self.recorded = RunConfig(**recording, precision=precision)
        fields = {name: study.dynamics[name] for name in RECORDING_FIELDS if name in study.dynamics}
        self.recording = RecordingConfig(**fields)
        self.flattening = FlattenConfig()

    @property
    def cache_precision(self) -> Precision:
        """Arithmetic of the teachers' outputs."""
        return "bfloat16" if self._precision == "bf16" else "float32"

    def teacher_config(self, net: str) -> RunConfig:
        """Return the training of a network as a teacher."""
        return RunConfig(student=net, **self._recipe, seed=TEACHER_SEED, precision=self._precision)

    def teacher_spec(self, cell: Cell) -> TeacherSpec:
        """Return what is known of the teacher of a cell that has one."""
        net, fraction = cell.teacher, cell.teacher_fraction
        assert net is not None, "the cell has a teacher"
        assert fraction is not None, "so it has its share of the data"
        if fraction == 1 and net in self._given:
            model = self._given[net]
            statistics = dataclasses.asdict(model.normalization)
            return TeacherSpec(net, 1.0, {"net": net, "digest": model.digest, **statistics}, model)
        config = self.teacher_config(net)
        return TeacherSpec(
            net, fraction, {"trained": config.to_dict(), "fraction": fraction, "data": self._source.fingerprint}
        )

    def dynamics_identity(self) -> dict[str, Any]:
        """Return what determines the recorded dynamics, JSON values."""
        if self.given_dynamics is not None:
            return {"digest": self.given_dynamics.digest}
        recording = dataclasses.asdict(self.recording)
        return {"trained": self.recorded.to_dict(), "recording": recording, "data": self._source.fingerprint}

    def method_identity(self, cell: Cell) -> dict[str, Any]:
        """Return what determines the scores and the samples of a cell beside method, fraction and seed; JSON values."""
        method = resolve(cell.method)
        identity: dict[str, Any] = dict(method.fixed)
        if "dynamics" in method.inputs:
            identity["dynamics"] = self.dynamics_identity()
        if method.inputs & {"cache", "teacher"}:
            identity["teacher"] = self.teacher_spec(cell).identity
        if "cache" in method.inputs:
            identity["cache"] = {"views": self.cache_views, "precision": self.cache_precision}
        if "teacher" in method.inputs:
            identity["flattened"] = dataclasses.asdict(self.flattening)
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

    def flattened_path(self, spec: TeacherSpec) -> Path:
        """Return the file of a flattened teacher."""
        digest = sha256_json(dataclasses.asdict(self.flattening))[:8]
        return self.out / "teachers" / f"{spec.name}-flat-{digest}.pt"

    def outputs_path(self, spec: TeacherSpec) -> Path:
        """Return the folder of a teacher's outputs on every sample."""
        return self.out / "outputs" / f"{spec.name}-{self.cache_views}-{self.cache_precision}"

    def dynamics_path(self) -> Path:
        """Return the folder of the dynamics."""
        if self.given_dynamics is not None:
            return self.given_dynamics.path
        return self.out / "dynamics" / sha256_json(self.dynamics_identity())[:12]

    def cache_path(self, cell: Cell, seed: int, views: int) -> Path:
        """Return the folder of the cache of a cell's teacher and samples; 0 views: all."""
        subset = self.subset_path(cell, seed)
        part = "all" if subset is None else subset.stem.rpartition("-")[2]
        return self.out / "caches" / f"{self.teacher_spec(cell).name}-{part}-{views}-{self.cache_precision}"

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
                0 if spec.given is not None else round(spec.fraction * samples) * self.teacher_config(spec.net).epochs
            )
            found[self.teacher_path(spec)] = (spec.net, images, len(self._source.test))
            if "cache" in method.inputs:
                found[self.outputs_path(spec) / MANIFEST] = (spec.net, 0, samples * self.cache_views)
            if "teacher" in method.inputs:
                flatten = self.flattening
                passes = flatten.iterations * flatten.batch_size * (1 if flatten.sharpness == "none" else 2)
                # With the gradient of each sample, which its score needs.
                found[self.flattened_path(spec)] = (spec.net, passes + samples, 0)
        if "dynamics" in method.inputs and self.given_dynamics is None:
            images = self.recorded.epochs * self.recording.runs * samples
            found[self.dynamics_path() / dynamics_format.MANIFEST] = (self.recorded.student, images, images)
        return {path: cost for path, cost in found.items() if not path.exists()}

    def trained_nets(self, cells: Iterable[Cell]) -> set[str]:
        """Return the networks that are trained before some cells: teachers, and the one whose dynamics are recorded."""
        return {network for cell in cells for network, images, _ in self.missing(cell).values() if images}
