"""The settings of a sweep, and one run of its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from kdfast.data.order import batch_count
from kdfast.distillation.config import RunConfig, check_integer
from kdfast.distillation.losses.alpha import parse_alpha
from kdfast.distillation.losses.plan import POOLED
from kdfast.errors import UsageError, unknown_name
from kdfast.files import sha256_json
from kdfast.sweep.recipes import ResolvedMethod
from kdfast.sweep.spec import MethodSpec
from kdfast.sweep.summary import BASELINE

# Values of `kd`: whether to train with the teacher, without it, or both.
KD_CHOICES = {"on": (True,), "off": (False,), "both": (True, False)}


# Settings of the loss that only runs with the teacher have; in a run's key where they are not the default.
LOSS_FIELDS = ("ce", "terms", "terms_warmup_epochs")


@dataclass(frozen=True)
class SweepConfig:
    """The settings of a sweep.

    Attributes:
        data: Source of data, see `kdfast.data.readers.registry`.
        methods: How to select the subsets.
        fractions: Shares of the training split to keep, in (0, 1].
        kd: Values of `KD_CHOICES`: whether to train with the teacher, for each set of runs.
        seeds: Seeds; each seeds the random subsets and tie-breaks, the initial weights, the order and the views.
        steps: Steps of each run; its last epoch may end early.
        settings: Settings of each run other than steps, alpha and seed: fields of `RunConfig`.
        alpha: Weight of the divergence in the runs with the teacher: a number, as in `RunConfig`, or `auto`.
        loss: Further settings of the loss in the runs with the teacher: those of `LOSS_FIELDS`.
        cache: Folder of the teacher's cache, for runs with the teacher and for scores computed from it.
        dynamics: Folder of recorded training dynamics, for scores computed from them.
        scores: Score files, by the names that `methods` gives them.
        key: Keys of the scores in those that another program wrote, by the same names; see `read_scores`.
        higher: What a high score means in those, "hard" or "easy", by the same names.
        loader: `auto`, `ffcv` or `resident`.
        size: Side in pixels of the stored images, for folders of larger images.
        order: Order of the samples of image folders, see `kdfast.data.readers.registry.open_source`.
        split: The test split of data that has none, see `kdfast.data.readers.registry.open_source`.
        augment: Augmentation in place of the data's own, see `kdfast.data.augment.presets.augment_source`; or None.
        device: Training device, see `kdfast.device.resolve_device`.
    """

    data: str
    methods: tuple[MethodSpec, ...]
    fractions: tuple[float, ...]
    kd: tuple[bool, ...]
    seeds: tuple[int, ...]
    steps: int
    settings: dict[str, Any]
    alpha: str = "auto"
    loss: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None
    dynamics: str | None = None
    scores: dict[str, str] = field(default_factory=dict)
    key: dict[str, str] = field(default_factory=dict)
    higher: dict[str, str] = field(default_factory=dict)
    loader: str = "auto"
    size: int | None = None
    order: str = "path"
    split: str | None = None
    augment: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, values in (("fractions", self.fractions), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UsageError(f"`{name}` is {','.join(map(str, values)) or 'empty'}: pass distinct numbers")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise UsageError(f"`fractions` contains {fraction}: pass numbers above 0 and at most 1")
        check_integer("steps", self.steps, 1)
        if BASELINE in self.scores:
            raise UsageError(
                f"`scores` names a file {BASELINE}, the method that tables compare all others with: use another name"
            )
        for seed in self.seeds:
            self.run_config(0, seed=seed)
        for option, given in (("key", self.key), ("higher", self.higher)):
            for file in given:
                if file not in self.scores:
                    raise unknown_name(f"`{option}`: `scores` has no file named", file, self.scores)
        self._check_loss()
        if True in self.kd:
            if self.cache is None:
                raise UsageError("runs with the teacher need `cache`: make one with kdfast cache, or set `kd` to off")
            for fraction in self.fractions:
                config = self.run_config(0, seed=0, alpha=self.alpha_at(fraction), kd=True)
                config.check_total()
                if not config.needs_teacher:
                    raise UsageError(
                        "`alpha` is 0, which trains without the teacher: set `kd` to off, or raise `alpha`"
                    )

    def _check_loss(self) -> None:
        loss = self.run_config(0, seed=0, kd=True)
        if True not in self.kd:
            unused = {
                "terms": bool(loss.terms), "terms_warmup_epochs": loss.terms_warmup_epochs > 0,
                "ce": loss.ce is not None, "alpha": self.alpha != SweepConfig.alpha,
                "temperature": loss.temperature != RunConfig.temperature,
            }  # fmt: skip
            for name in (name for name, given in unused.items() if given):
                raise UsageError(f"`kd` is off, and `{name}` is for runs with the teacher: omit one of them")
        for term in loss.terms:
            if term.entry.taps and not (loss.views == 1 and set(term.entry.taps) <= set(POOLED)):
                raise UsageError(
                    f"the term {term.name} reads activations of the teacher, and a sweep has its cache alone: use "
                    "terms of the logits, or kdfast reproduce, which runs the teacher"
                )

    def alpha_at(self, fraction: float) -> float:
        """Return the weight of the divergence in the runs with the teacher on a share of the training split."""
        return parse_alpha(self.alpha, fraction, 1.0 if self.loss.get("ce") is None else math.inf)

    def run_config(self, samples: int, *, seed: int, alpha: float = 0.0, kd: bool = False) -> RunConfig:
        """Return the settings of one run on that many samples, 0: unknown; its views are not resolved yet."""
        batch_size = int(self.settings["batch_size"])
        config = RunConfig(**self.settings, **(self.loss if kd else {}), steps=self.steps, seed=seed, alpha=alpha)
        return config if samples == 0 else config.resolve_steps(batch_count(samples, batch_size))

    def shared_settings(self, kd: bool) -> dict[str, Any]:
        """Return the settings that all runs with the teacher, or all runs without it, share."""
        loss = self.run_config(0, seed=0, kd=True).to_dict()
        teacher = {"alpha": self.alpha, **{k: loss[k] for k in LOSS_FIELDS if k in loss}} if kd else {}
        omitted = () if kd else ("temperature",)
        augment = {} if self.augment is None else {"augment": self.augment}
        return {
            "steps": self.steps,
            **augment,
            **{k: v for k, v in self.settings.items() if k not in omitted},
            **{k: loss[k] for k in ("student", "student_code", "init") if k in loss},
            **teacher,
        }


@dataclass(frozen=True)
class SweepRun:
    """One run of the grid.

    Attributes:
        recipe: How to select its subset.
        fraction: Share of the training split to keep.
        kd: Whether it trains with the teacher.
        seed: Its seed.
        settings: Everything that determines the result, including digests of the inputs; JSON values.
    """

    recipe: ResolvedMethod
    fraction: float
    kd: bool
    seed: int
    settings: dict[str, Any] = field(hash=False)

    @property
    def key(self) -> str:
        """SHA-256 (hexadecimal) of the settings; rows with equal keys are the same row."""
        return sha256_json(self.settings)

    def __str__(self) -> str:
        """Return method, fraction, teacher and seed, for people."""
        return f"{self.recipe} f={self.fraction:g} {'KD' if self.kd else 'plain'} seed {self.seed}"
