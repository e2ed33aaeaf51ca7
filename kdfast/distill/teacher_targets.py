"""The teacher's side of a run: a cache, or a model to run, or neither."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.data.readers.registry import Source
from kdfast.distill.config import RunConfig
from kdfast.distill.targets import CachedTargets, OnlineTargets, Targets
from kdfast.errors import CacheMismatch, UsageError
from kdfast.files import sha256_file
from kdfast.nets.checkpoint import Model
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class TeacherSide:
    """The teacher's side of a run: a cache, or a model to run, or neither."""

    cache: TeacherCache | None = None
    model: Model | None = None

    def identity(self) -> dict[str, Any] | None:
        """What the logits depend on."""
        if self.cache is not None:
            return {"cache": sha256_file(self.cache.path / "manifest.json"), "digest": self.cache.teacher_digest}
        if self.model is not None:
            statistics = dataclasses.asdict(self.model.normalization)
            return {"net": self.model.name, "digest": self.model.digest, **statistics}
        return None

    def targets(
        self, source: Source, ids: NDArray[np.int64], config: RunConfig, device: torch.device
    ) -> Targets | None:
        """Where the logits of the samples come from; None without a teacher.

        Raises:
            CacheMismatch: If the cache lacks the views of the run, or is for another temperature.
        """
        seed = config.view_seed or 0
        if self.cache is not None:
            # Refuses a view seed that the cache does not have.
            self.cache.slots_for(ids[:1], np.zeros(1, np.int64), config.views, seed)
            self._check_temperature(config)
            return CachedTargets(self.cache, config.views, seed, device)
        if self.model is not None:
            return OnlineTargets(self.model, source.views, device)
        return None

    def _check_temperature(self, config: RunConfig) -> None:
        kept = None if self.cache is None else self.cache.top_k
        if self.cache is not None and kept is not None and kept.temperature != config.temperature:
            raise CacheMismatch(
                f"{self.cache.path} holds the {kept.k} most probable classes, the others summed up for temperature "
                f"{kept.temperature:g}; the run has {config.temperature:g}: give --temperature {kept.temperature:g}, "
                "or build a cache for the run's"
            )

    def resolve_views(self, config: RunConfig, available: int) -> RunConfig:
        """Settle how many views the run draws from, and the seed of their choice.

        Args:
            config: The settings, with `views` 0 for all the cache holds, or all there are, and `view_seed` None for
                the cache's, or 0.
            available: Views that the data has.

        Raises:
            UsageError: If there are not as many as asked for.
        """
        cache = self.cache
        most = available if cache is None else cache.n_views
        if config.views > most:
            held = f"the data has {available}" if cache is None else f"the cache holds {most} (of {available})"
            raise UsageError(
                f"--views is {config.views}, but {held}; lower it" + ("" if cache is None else " or cache more views")
            )
        by_default = 0 if cache is None else cache.view_seed
        seed = by_default if config.view_seed is None else config.view_seed
        return dataclasses.replace(config, views=config.views or most, view_seed=seed)
