"""What a sweep is asked for, and the grid of runs that follows from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from kdfast.data.order import batch_count
from kdfast.distill.config import RunConfig
from kdfast.distill.schedule import parse_alpha
from kdfast.errors import UsageError
from kdfast.sweep.recipes import Recipe
from kdfast.sweep.spec import MethodSpec

KD = {"on": (True,), "off": (False,), "both": (True, False)}


@dataclass(frozen=True)
class SweepConfig:
    """The settings of a sweep.

    Attributes:
        data: A source of data, see `kdfast.data.readers.registry`.
        methods: How the subsets are chosen.
        fractions: Shares of the training split to keep, in (0, 1].
        kd: With the teacher, without, or both.
        seeds: Each draws random subsets and ties, initial weights, order and views.
        steps: Steps of each run, rounded to whole epochs of its subset, at least one.
        run: Settings of each run other than epochs, alpha and seed: fields of `RunConfig`.
        alpha: Weight of the teacher's term in the runs with it: a number in (0, 1], or `auto`.
        cache: The teacher's cache, for runs with the teacher and for scores made from it.
        dynamics: A recording of training dynamics, for scores made from it.
        scores: Score files by the name they have among the methods.
        loader: `auto`, `ffcv` or `resident`.
        size: Side of the stored images, for folders of larger ones.
        device: Where to train, see `kdfast.device.resolve_device`.
    """

    data: str
    methods: tuple[MethodSpec, ...]
    fractions: tuple[float, ...]
    kd: tuple[bool, ...]
    seeds: tuple[int, ...]
    steps: int
    run: dict[str, Any]
    alpha: str = "auto"
    cache: str | None = None
    dynamics: str | None = None
    scores: dict[str, str] = field(default_factory=dict)
    loader: str = "auto"
    size: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, values in (("--fractions", self.fractions), ("--seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UsageError(f"{name} is {','.join(map(str, values)) or 'empty'}; needed: distinct numbers")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise UsageError(f"--fractions has {fraction}; needed: numbers above 0 and at most 1")
        if self.steps < 1:
            raise UsageError(f"--steps is {self.steps}; needed: a whole number of at least 1")
        for seed in self.seeds:
            self.run_config(0, seed=seed)
        if True in self.kd:
            if self.cache is None:
                raise UsageError("runs with the teacher need --cache (made by `kdfast cache`); or give --kd off")
            for fraction in self.fractions:
                if parse_alpha(self.alpha, fraction) == 0:
                    raise UsageError("--alpha 0 is training without the teacher; give --kd off, or a larger alpha")

    def run_config(self, samples: int, *, seed: int, alpha: float = 0.0) -> RunConfig:
        """The settings of one run on so many samples, its views not yet resolved."""
        size = int(self.run["batch_size"])
        epochs = 1 if samples == 0 else max(1, round(self.steps / batch_count(samples, size)))
        return RunConfig(**self.run, epochs=epochs, seed=seed, alpha=alpha)

    def protocol(self, kd: bool) -> dict[str, Any]:
        """What all runs with the teacher, or all without, have in common."""
        teacher = {"alpha": self.alpha} if kd else {}
        left_out = () if kd else ("temperature",)
        return {"steps": self.steps, **{k: v for k, v in self.run.items() if k not in left_out}, **teacher}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        recipe: How its subset is chosen.
        fraction: Share of the training split.
        kd: With the teacher or without.
        seed: The run's seed.
        settings: Everything that decides the outcome, digests of the inputs included; JSON values.
    """

    recipe: Recipe
    fraction: float
    kd: bool
    seed: int
    settings: dict[str, Any] = field(hash=False)

    @property
    def key(self) -> str:
        """Digest of the settings: what makes two rows the same row."""
        text = json.dumps(self.settings, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        """For people: method, fraction, teacher, seed."""
        return f"{self.recipe} f={self.fraction:g} {'KD' if self.kd else 'plain'} seed {self.seed}"
