"""What a score is computed from, what it returns, and the checks they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import DataError, UsageError, did_you_mean
from kdfast.prune.rules.base import FloatArray, Option, OptionValue

if TYPE_CHECKING:
    from kdfast.nets.checkpoint import Model

Floats32 = npt.NDArray[np.float32]

MAKE_CACHE = "kdfast cache --data D --teacher T.pt --views 1 --out C, and give --cache C"
MAKE_DYNAMICS = "kdfast dynamics --data D --net NAME --out DYN, and give --dynamics DYN"


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may be computed from; arrays are in the order of the training split.

    Attributes:
        labels: int64 (N,), the classes of the training split.
        seed: Seed of whatever the score draws.
        logits: float32 (N, C), the teacher's on the samples as they are, or None.
        features: float32 (N, D), what entered the teacher's classifier, or None.
        dynamics: Recorded training dynamics, or None.
        device: Where heavy work runs.
        options: The method's options by name; those not given take their defaults.
        source: The data, for scores that run a network on the images, or None.
        network: The network that such scores run, or None.
    """

    labels: IntArray
    seed: int
    logits: Floats32 | None = None
    features: Floats32 | None = None
    dynamics: Dynamics | None = None
    device: str = "cpu"
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    source: Source | None = None
    network: Model | None = None

    def number(self, option: str) -> float:
        """An option's value as a float."""
        value = self.options[option]
        if value is None:
            raise UsageError(f"option {option} has no value; give one")
        return float(value)


@dataclass(frozen=True)
class Scored:
    """A score.

    Attributes:
        values: float64 (N,), higher = harder = kept first by the `hard` rule.
        extras: Further numbers a sample, float64 (N,) each, such as standard errors, or what the rule published with
            the score needs.
        used: Options that were left open and what they became, such as the epoch.
    """

    values: FloatArray
    extras: dict[str, FloatArray] = field(default_factory=dict)
    used: dict[str, OptionValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to score.

    Attributes:
        name: Its name.
        compute: The function.
        needs: `cache`, `dynamics` or both; one of them suffices. Empty: labels are enough.
        rule: The selection rule that it was published with.
        doc: One line for help.
        options: Its options by name.
    """

    name: str
    compute: Callable[[ScoreInputs], Scored]
    needs: frozenset[str]
    rule: str
    doc: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def complete(self, given: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
        """All options with their values.

        Raises:
            UsageError: An option the method does not have (the nearest is suggested), or a value it does not take.
        """
        for key in given:
            if key not in self.options:
                unknown(f"{self.name} has no option", key, self.options)
        return {key: option.parse(key, given.get(key, option.default)) for key, option in self.options.items()}


def unknown(what: str, name: str, known: Mapping[str, object]) -> NoReturn:
    """Refuse a name, and suggest the nearest.

    Raises:
        UsageError: Always.
    """
    hint = did_you_mean(name, known)
    raise UsageError(f"{what} {name!r}: {hint}known: {', '.join(known) or 'none'}")


def need_dynamics(inputs: ScoreInputs, method: str) -> Dynamics:
    """The dynamics.

    Raises:
        UsageError: If there are none; says which command makes them.
    """
    if inputs.dynamics is None:
        raise UsageError(f"{method} needs training dynamics: record them with {MAKE_DYNAMICS}")
    return inputs.dynamics


def need_logits(inputs: ScoreInputs, method: str) -> Floats32:
    """The teacher's logits.

    Raises:
        UsageError: If there are none; says which command makes them.
    """
    if inputs.logits is None:
        raise UsageError(f"{method} needs a teacher's logits: make them with {MAKE_CACHE}")
    return inputs.logits


def need_features(inputs: ScoreInputs, method: str) -> Floats32:
    """The teacher's features.

    Raises:
        UsageError: If there are none; says which command makes them.
    """
    if inputs.features is None:
        raise UsageError(f"{method} needs a teacher's features: make them with {MAKE_CACHE}")
    return inputs.features


def takes_dynamics(inputs: ScoreInputs, method: str) -> bool:
    """Whether a score that could take either is to take the dynamics, by its option `use`.

    Raises:
        UsageError: If there are neither dynamics nor a teacher's logits.
    """
    use = inputs.options.get("use")
    if use is not None:
        return use == "dynamics"
    if inputs.dynamics is None and inputs.logits is None:
        raise UsageError(
            f"{method} needs training dynamics or a teacher's cache: record the ones with {MAKE_DYNAMICS}; or make the "
            f"other with {MAKE_CACHE}"
        )
    return inputs.dynamics is not None


USE = Option(
    None,
    "what to compute from; by default the dynamics where given (moderate: the cache)",
    choices=("dynamics", "cache"),
)


def require_fit(inputs: ScoreInputs) -> None:
    """Make sure that all inputs are of the same samples, and finite.

    Raises:
        DataError: If they are not.
    """
    n = len(inputs.labels)
    for name, array in (("logits", inputs.logits), ("features", inputs.features)):
        if array is None:
            continue
        if array.ndim != 2 or len(array) != n:
            raise DataError(f"{name} {array.shape} for {n} samples: needed one row a sample; cache all of this data")
        if not np.isfinite(array).all():
            raise DataError(f"some {name} are not finite; build the teacher's cache again")
    if n < 1 or int(inputs.labels.min()) < 0:
        raise DataError("scores need at least one sample, and labels from 0 on")
    if inputs.logits is not None and int(inputs.labels.max()) >= inputs.logits.shape[1]:
        raise DataError(f"labels up to {inputs.labels.max()} for logits of {inputs.logits.shape[1]} classes")
    if inputs.dynamics is not None:
        inputs.dynamics.require(inputs.labels)


def require_sound(values: FloatArray, n: int, what: str) -> None:
    """Make sure that there is one finite number a sample.

    Raises:
        DataError: If there is not.
    """
    if values.shape != (n,):
        raise DataError(f"{what}: {values.shape} numbers for {n} samples; score this data again")
    if not np.isfinite(values).all():
        raise DataError(f"{what}: {int((~np.isfinite(values)).sum())} of {n} are not finite; score again")
