"""Plan of a run on inputs that are open: settings resolved, and everything that identifies the run.

`kdfast.distillation.inputs` opens the inputs of a single run. Several runs on the same data share one `LoadedInputs`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kdfast
from kdfast.data.loaders import Loader
from kdfast.data.order import batch_count
from kdfast.data.readers.folders.file_loader import is_files
from kdfast.data.readers.folders.image_file import decoder
from kdfast.data.source import Source
from kdfast.data.views import Normalization
from kdfast.distillation.batches import Batches
from kdfast.distillation.config import Execution, RunConfig
from kdfast.distillation.losses.plan import TermPlan, collect_samples, plan_terms
from kdfast.distillation.recipe.mixing import Mixing
from kdfast.distillation.targets import CachedTargets, OnlineTargets, TeacherTargets
from kdfast.distributed.group import Distributed
from kdfast.errors import UsageError
from kdfast.nets.checkpoint import Model
from kdfast.nets.initial import build_started_net


@dataclass
class Plan:
    """Everything that `kdfast.distillation.train.train` needs.

    Attributes:
        config: The settings, resolved.
        source: The data.
        ids: int64 (n,), the kept samples.
        loader: Loader of their images.
        targets: Source of the teacher's logits; None without a teacher.
        normalization: The student's input statistics.
        device: Where to train.
        distributed: This process among those of the run.
        identity: Settings and fingerprints of the inputs. Two runs are the same run if these are equal.
        metadata: Values for config.json: paths, device, versions.
        stage_seconds: Seconds spent in earlier stages, where known.
        execution: How the steps are computed.
        terms: What the terms of the loss read of both networks.
        teacher: The teacher, if it is at hand, to compare the student's predictions with.
    """

    config: RunConfig
    source: Source
    ids: NDArray[np.int64]
    loader: Loader
    targets: CachedTargets | OnlineTargets | None
    normalization: Normalization
    device: torch.device
    distributed: Distributed
    identity: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)
    terms: TermPlan = field(default_factory=TermPlan)
    teacher: Model | None = None

    def can_capture(self) -> bool:
        """Return whether a step may run as a CUDA graph.

        Not with several processes, whose reductions a graph would have to include, nor with the loss scale of float16,
        nor with views whose operations the CPU draws and starts.
        """
        return (
            self.execution.cuda_graph
            and self.device.type == "cuda"
            and self.distributed.world_size == 1
            and self.config.precision != "fp16"
            and (self.source.view_spec.has_boxes or not self.source.view_spec.is_drawn)
        )

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return batch_count(len(self.ids), self.config.batch_size)

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.config.count_steps(self.per_epoch)

    @property
    def images(self) -> int:
        """Images of these steps, over all processes."""
        epochs, rest = divmod(self.steps, self.per_epoch)
        return epochs * len(self.ids) + rest * self.config.batch_size

    def describe(self) -> dict[str, Any]:
        """Summarize the run: settings, inputs and sizes."""
        return {
            **self.identity,
            **self.metadata,
            "samples": len(self.ids),
            "of": len(self.source.train),
            "steps": self.steps,
            "images": self.images,
        }

    def batches(self) -> Batches:
        """Return the run's seeded batches."""
        return Batches(
            self.ids,
            self.loader,
            self.source.view_spec,
            n_views=self.config.views,
            view_seed=self.config.view_seed or 0,
            targets=self.targets if isinstance(self.targets, CachedTargets) else None,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            device=self.device,
            distributed=self.distributed,
            mixing=self._mixing(),
        )

    def _mixing(self) -> Mixing | None:
        if not self.config.mixes:
            return None
        return Mixing(self.config.mixup, self.config.cutmix, self.source.view_spec.size)


@dataclass(frozen=True)
class LoadedInputs:
    """Opened inputs that any number of runs on the same data can share.

    Attributes:
        source: The data.
        loader: Loader of the training split's images.
        normalization: The student's input statistics.
        teacher: The teacher, or None; used regardless of alpha.
    """

    source: Source
    loader: Loader
    normalization: Normalization
    teacher: TeacherTargets

    def plan(
        self,
        config: RunConfig,
        ids: NDArray[np.int64],
        *,
        device: torch.device,
        distributed: Distributed | None = None,
        metadata: Mapping[str, Any] | None = None,
        stage_seconds: Mapping[str, float] | None = None,
        execution: Execution | None = None,
    ) -> Plan:
        """Plan a run on these inputs.

        Args:
            config: The settings. `views` and `view_seed` are resolved as `TeacherTargets.resolve_views` describes,
                `steps` as `RunConfig.resolve_steps`.
            ids: int64 (n,), the kept samples.
            device: Where to train.
            distributed: This process among those of the run; None for a single process.
            metadata: Values for config.json.
            stage_seconds: Seconds spent in earlier stages.
            execution: How the steps are computed.

        Returns:
            The plan.

        Raises:
            UsageError, CacheMismatch: If there are fewer views than requested.
            UsageError: A part of the run is longer than its `steps`.
        """
        source, distributed, execution = self.source, distributed or Distributed(), execution or Execution()
        config.check_total()
        config = config.resolve_steps(batch_count(len(ids), config.batch_size))
        config = self.teacher.resolve_views(config, source.view_spec.count)
        terms = self._plan_terms(config, ids, execution)
        targets = self.teacher.open(source, ids, config, device, terms.teacher)
        return Plan(
            config=config,
            source=source,
            ids=ids,
            loader=self.loader,
            targets=targets,
            normalization=self.normalization,
            device=device,
            distributed=distributed,
            identity={
                **config.to_dict(),
                "data": source.fingerprint,
                "subset": hashlib.sha256(np.sort(ids).tobytes()).hexdigest(),
                "augmentation": source.view_spec.to_dict(),
                "normalization": dataclasses.asdict(self.normalization),
                "targets": None if targets is None else targets.name,
                "teacher": self.teacher.identity(),
            },
            metadata={
                **(metadata or {}),
                "loader": self.loader.name,
                **({"decoder": decoder()} if is_files(source.train) else {}),
                "device": str(device),
                "processes": distributed.world_size,
                "threads": torch.get_num_threads(),
                **dataclasses.asdict(execution),
                "kdfast": kdfast.__version__,
                "torch": torch.__version__,
            },
            stage_seconds={**(stage_seconds or {}), "compile loader": self.loader.compile_seconds},
            execution=execution,
            terms=terms,
            teacher=self.teacher.model,
        )

    def _plan_terms(self, config: RunConfig, ids: NDArray[np.int64], execution: Execution) -> TermPlan:
        """Plan the terms of the loss, and check that they can be computed as the run is."""
        if not config.terms and not config.taps:
            return TermPlan()
        with torch.random.fork_rng(devices=[]):
            student = build_started_net(config.student, len(self.source.classes), config.init)
        plan = plan_terms(
            config.terms,
            config.taps,
            student,
            self.teacher.model,
            self.teacher.cache,
            views=config.views,
            size=self.source.view_spec.size,
            samples=collect_samples(self.source, ids, config.seed),
            smallest=len(ids) % config.batch_size or config.batch_size,
        )
        if plan.student and execution.compile:
            raise UsageError("`compile` cannot read activations: omit it, or use terms of the logits alone")
        return plan
