"""Settings of one training run, checked on construction."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kdfast.distillation.losses.settings import INITIAL_SHARE, TermSetting
from kdfast.distillation.recipe.optimizer import LR_SCHEDULES, OPTIMIZERS
from kdfast.errors import UsageError
from kdfast.nets.initial import digest_weights
from kdfast.nets.sources.reopen import identify
from kdfast.ops.kd_loss.validation import check_temperature

# Counts and their products stay in 64 bits.
LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**63 - 1
LARGEST_MIXING = 1000.0  # the quantiles of narrower distributions are not exact

# Settings that a run's config.json omits where they are the default, as runs of earlier versions do.
OPTIONAL = (
    "ce", "terms", "taps", "initial_epochs", "terms_warmup_epochs", "reshape_logits", "optimizer", "label_smoothing",
    "ema", "clip", "mixup", "cutmix", "init", "steps",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines the final weights of a run, given the data.

    The defaults are the recipe of RepDistiller (Tian et al., Contrastive Representation Distillation, ICLR 2020), with
    which the pruning paper trains.

    Attributes:
        student: Name of the network, with its arguments if it has any; see `kdfast.nets.build_net`.
        epochs: Passes over the subset.
        batch_size: Samples per step; the last, smaller batch of an epoch is kept.
        lr: Highest learning rate.
        momentum: Momentum in [0, 1) of SGD; beta1 of AdamW.
        weight_decay: L2 penalty on every parameter; decoupled for AdamW.
        schedule: A key of `LR_SCHEDULES`.
        warmup_epochs: Epochs of linear warm-up.
        alpha: Weight of the divergence from the teacher, in [0, 1] unless `ce` is set; 0 without terms is training
            without a teacher.
        temperature: Temperature of that divergence, > 0.
        views: Number of augmentation views per sample; 0 means all of them.
        view_seed: Seed of the choice of views; None until it is resolved to the cache's view seed, or 0.
        precision: `fp32`, or `bf16` / `fp16` for automatic mixed precision.
        seed: Seed of the initial weights, the order and the views.
        ce: Weight of the cross-entropy, >= 0; None for 1 - alpha.
        terms: Further terms of the loss.
        taps: Where the terms read activations, if not at the default places: (`student.TAP` or `teacher.TAP`, place)
            each; see `kdfast.nets.taps`.
        initial_epochs: Epochs of the phase in which terms train alone that ask for one, the first of the run's epochs;
            None for an eighth if there is such a term, at least one but not all of them, an epoch that `steps` cut
            short not counted; else 0.
        reshape_logits: Whether the teacher's logits are reshaped; see `kdfast.distillation.losses.logits.reshaped`.
        terms_warmup_epochs: Epochs over which the terms' weights rise linearly from 0, after the initial phase.
        optimizer: A key of `OPTIMIZERS`.
        label_smoothing: Share of each label that is spread evenly over all classes, in [0, 1).
        ema: Decay in [0, 1) of the average of the weights that is evaluated and saved; 0: the weights themselves.
        clip: Largest norm of the gradient of all parameters together, to which larger ones are scaled; 0: any.
        mixup: a of mixup's Beta(a, a), see `kdfast.distillation.recipe.mixing`; 0: none.
        cutmix: The same of CutMix.
        init: File of the initial weights, see `kdfast.nets.initial.load_initial_weights`; None for random ones.
        steps: Steps of the run, in place of `epochs`: the last epoch may end early. None: all steps of the epochs. See
            `resolve_steps`.

    Raises:
        UsageError: If a value is out of range.
    """

    student: str
    epochs: int = 240
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "step"
    warmup_epochs: float = 0.0
    alpha: float = 0.0
    temperature: float = 4.0
    views: int = 0
    view_seed: int | None = None
    precision: str = "fp32"
    seed: int = 0
    ce: float | None = None
    terms: tuple[TermSetting, ...] = ()
    taps: tuple[tuple[str, str], ...] = ()
    initial_epochs: int | None = None
    terms_warmup_epochs: float = 0.0
    reshape_logits: bool = False
    optimizer: str = "sgd"
    label_smoothing: float = 0.0
    ema: float = 0.0
    clip: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    init: str | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("views", 0)):
            check_integer(name, getattr(self, name), least)
        if self.steps is not None:
            check_integer("steps", self.steps, 1)
        check_integer("seed", self.seed, 0, LARGEST_SEED)
        check_integer("view_seed", self.view_seed or 0, 0, LARGEST_SEED)
        for name in (
            "lr", "momentum", "weight_decay", "warmup_epochs", "terms_warmup_epochs", "label_smoothing", "ema", "clip",
            "mixup", "cutmix",
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"`{name}` is {value}: pass a finite number, 0 or more")
        for name in ("momentum", "label_smoothing", "ema"):
            if getattr(self, name) >= 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}: pass a number in [0, 1)")
        if self.steps is None:
            self._check_phases(self.epochs)
        check_temperature(self.temperature, name="`temperature`", error=UsageError)
        self._check_weights()
        _check_choice("schedule", self.schedule, tuple(LR_SCHEDULES))
        _check_choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        _check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        if self.optimizer == "nesterov" and not self.momentum:
            raise UsageError("`optimizer` is nesterov, which needs momentum: pass a `momentum` above 0, or sgd")
        self._check_mixing()

    def _check_phases(self, epochs: float) -> None:
        """Check that the parts of a run fit into its length."""
        length = f"{round(epochs, 2):g} epochs"
        for name in ("warmup_epochs", "terms_warmup_epochs"):
            if getattr(self, name) > epochs:
                raise UsageError(f"`{name}` is {getattr(self, name)} of {length}: lower it")
        if self.initial_epochs and self.initial_epochs >= epochs:
            raise UsageError(
                f"`initial_epochs` is {self.initial_epochs} of {length}, which leaves none for the student: lower it"
            )

    def _check_mixing(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) > LARGEST_MIXING:
                raise UsageError(f"`{name}` is {getattr(self, name)}: pass at most {LARGEST_MIXING}")
        labeled = [term.name for term in self.terms if term.entry.labels]
        if self.mixes and labeled:
            raise UsageError(
                f"the term {labeled[0]} compares with one label per image, and `mixup` and `cutmix` mix two: omit one"
            )

    def _check_weights(self) -> None:
        if self.ce is None and not 0 <= self.alpha <= 1:
            raise UsageError(f"`alpha` is {self.alpha}: pass a number in [0, 1], or also the weight `ce`")
        for name, value in (("alpha", self.alpha), ("ce", self.ce or 0.0)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"`{name}` is {value}: pass a finite number, 0 or more")
        check_integer("initial_epochs", self.initial_epochs or 0, 0)
        if self.terms_warmup_epochs and not self.terms:
            raise UsageError(
                f"`terms_warmup_epochs` is {self.terms_warmup_epochs:g}, and the loss has no terms: omit it, or add "
                "`terms`"
            )
        if self.initial_epochs and not self._has_initial_phase():
            raise UsageError(
                f"`initial_epochs` is {self.initial_epochs}, and no term trains alone first: omit it, or add such a "
                "term"
            )

    def resolve_steps(self, per_epoch: int) -> RunConfig:
        """Return the settings with the epochs in which `steps` end; without `steps` if they fill these epochs.

        Args:
            per_epoch: Steps of an epoch.

        Raises:
            UsageError: A part of the run, such as the warm-up, is longer than its steps.
        """
        if self.steps is None:
            return self
        self._check_phases(self.steps / per_epoch)
        epochs = math.ceil(self.steps / per_epoch)
        return dataclasses.replace(self, epochs=epochs, steps=self.steps if self.steps < epochs * per_epoch else None)

    def count_steps(self, per_epoch: int) -> int:
        """Return the steps of the run, once `steps` is resolved; `per_epoch` are those of an epoch."""
        return self.steps or self.epochs * per_epoch

    def check_total(self) -> None:
        """Check that some part of the loss has a weight, once alpha is resolved.

        Raises:
            UsageError: None has.
        """
        if self.cross_entropy_weight == self.alpha == 0 and not any(term.weight for term in self.terms):
            raise UsageError("every weight of the loss is 0: raise `ce`, `alpha` or the weight of a term")

    def _has_initial_phase(self) -> bool:
        return any(term.entry.initial or term.entry.prepares for term in self.terms)

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss depends on a teacher."""
        return self.alpha > 0 or bool(self.terms)

    @property
    def cross_entropy_weight(self) -> float:
        """The weight of the cross-entropy."""
        return 1 - self.alpha if self.ce is None else self.ce

    @property
    def initial_phase(self) -> int:
        """Epochs of the initial phase."""
        if self.initial_epochs is not None:
            return self.initial_epochs
        if not self._has_initial_phase():
            return 0
        whole = self.epochs if self.steps is None else self.epochs - 1
        return max(0, min(max(1, round(INITIAL_SHARE * whole)), whole - 1))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values; those of `OPTIONAL` only where they are not the default.

        For the network's own code and the file of the initial weights, digests stand.
        """
        fields = dataclasses.asdict(self) | {"terms": [term.to_dict() for term in self.terms], "taps": dict(self.taps)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        unchanged = {name for name in OPTIONAL if getattr(self, name) == defaults[name]}
        fields |= identify(self.student) | ({} if self.init is None else {"init": digest_weights(self.init)})
        return {name: value for name, value in fields.items() if name not in unchanged}


def check_integer(name: str, value: int, least: int, most: int = LARGEST_COUNT) -> None:
    """Raise UsageError if the argument `name` is less than `least` or more than `most`."""
    if value < least:
        raise UsageError(f"`{name}` is {value}: pass an integer of at least {least}")
    if value > most:
        raise UsageError(f"`{name}` is {value}: pass an integer of at most {most}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"`{name}` is {value!r}: pass one of {', '.join(choices)}")


@dataclass(frozen=True)
class Execution:
    """How the steps of a run are computed. Changes the rounding at most, so that a run may resume with another one.

    Attributes:
        compile: Compile the network with `torch.compile`.
        cuda_graph: On a GPU, replay a step as a CUDA graph where that is possible; see `Plan.can_capture`.
    """

    compile: bool = False
    cuda_graph: bool = True
