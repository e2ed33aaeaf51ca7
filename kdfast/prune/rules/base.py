"""What a selection rule is: the group of samples it chooses from, the options it takes, and the function itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray, Purpose, hash64, unit
from kdfast.errors import DataError, UsageError, did_you_mean

FloatArray = npt.NDArray[np.float64]
OptionValue = float | int | str | None


@dataclass(frozen=True)
class RuleInputs:
    """A group of samples to choose from: a class, or all of them.

    Attributes:
        scores: float64 (n,), finite; higher = harder.
        ties: float64 (n,), seeded numbers that order samples of equal score.
        count: How many to keep, in [0, n].
        fraction: Share of the whole training split to keep.
        seed: Seed of what the rule draws.
        ids: int64 (n,), the samples' indices into the training split; draws depend on them, not on the grouping.
        features: float32 (n, D), or None.
        extras: Further numbers a sample, float64 (n,) each, that the score left for its rule.
        options: Every option of the rule, checked.
        classes: Number of classes of the training split.
        device: Where heavy work runs.
    """

    scores: FloatArray
    ties: FloatArray
    count: int
    fraction: float
    seed: int
    ids: IntArray
    features: npt.NDArray[np.float32] | None = None
    extras: Mapping[str, FloatArray] = field(default_factory=dict)
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    classes: int = 1
    device: str = "cpu"

    def number(self, option: str) -> float:
        """An option's value as a float; nan where it is still open."""
        value = self.options.get(option)
        return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Option:
    """One option of a rule.

    Attributes:
        default: Its value where none is given; None leaves it to the rule, as the summary says.
        summary: What it does, for help.
        low: Smallest number.
        high: Largest number.
        whole: Whether it must be a whole number.
        choices: The values of an option that is no number.
    """

    default: OptionValue
    summary: str
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    choices: tuple[str, ...] = ()

    def parse(self, name: str, value: OptionValue) -> OptionValue:
        """Check a value, given as itself or as text.

        Raises:
            UsageError: It is none of the choices, no number, or out of range.
        """
        if value is None:
            return None
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"option {name}={value}: must be one of {', '.join(self.choices)}")
            return value
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"option {name}={value}: must be a number") from None
        if not self.low <= number <= self.high or (self.whole and number != int(number)):
            kind = "a whole number" if self.whole else "a number"
            raise UsageError(f"option {name}={value}: must be {kind} from {self.low:g} to {self.high:g}")
        return int(number) if self.whole else number


@dataclass(frozen=True)
class Rule:
    """A selection rule: call it with `RuleInputs` to get int64 (count,) positions into the group.

    Attributes:
        select: The function.
        summary: What it keeps, for help.
        options: Its options by name.
        needs: What it cannot do without: "features", or names of extras.
        settle: Given all samples as one group, returns the values of the options that were left open; every group
            is chosen with them. None where no option can be left open.
    """

    select: Callable[[RuleInputs], IntArray]
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    settle: Callable[[RuleInputs], dict[str, OptionValue]] | None = None

    def __call__(self, inputs: RuleInputs) -> IntArray:
        """Positions of the samples to keep."""
        return self.select(inputs)

    def settled(self, inputs: RuleInputs) -> RuleInputs:
        """All samples as one group, with a value for every option that was left open."""
        if self.settle is None or None not in inputs.options.values():
            return inputs
        found = self.settle(inputs)
        options = {name: found[name] if value is None else value for name, value in inputs.options.items()}
        return replace(inputs, options=options)

    def complete(self, name: str, given: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
        """All options with their values.

        Args:
            name: The rule's name, for messages.
            given: Values by option name.

        Raises:
            UsageError: An option the rule does not have (the nearest is suggested), or a value it does not take.
        """
        return complete(f"rule {name!r}", self.options, given)


def complete(owner: str, options: Mapping[str, Option], given: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """All options with their values, those not given with their defaults.

    Args:
        owner: Whose options they are, for messages.
        options: The options by name.
        given: Values by name.

    Raises:
        UsageError: There is no such option (the nearest is suggested), or it does not take the value.
    """
    for key in given:
        if key not in options:
            hint = did_you_mean(key, options)
            raise UsageError(f"{owner} has no option {key!r}: {hint}its options: {', '.join(options) or 'none'}")
    values = {key: option.default if given.get(key) is None else given[key] for key, option in options.items()}
    return {key: option.parse(key, values[key]) for key, option in options.items()}


def by_rank(keys: FloatArray, ties: FloatArray) -> IntArray:
    """Positions in descending order of `keys`, equal ones in ascending order of `ties`; int64 (n,)."""
    return np.lexsort((ties, -keys))


def uniform(seed: int, ids: IntArray) -> FloatArray:
    """A uniform number in (0, 1) for each sample, float64 (n,): a hash of the seed and the sample's index."""
    return unit(hash64(Purpose.RULE, seed, ids)) + 2.0**-54


def drop_hardest(inputs: RuleInputs, share: float) -> IntArray:
    """Positions of the group without its hardest `share`, hardest first; never fewer than are to be kept."""
    order = by_rank(inputs.scores, inputs.ties)
    return order[min(round(share * len(order)), len(order) - inputs.count) :]


def need_features(inputs: RuleInputs) -> npt.NDArray[np.float32]:
    """The group's features.

    Raises:
        DataError: They are not finite, or there is no (n, D) of them.
    """
    features = inputs.features
    if features is None or features.ndim != 2 or len(features) != len(inputs.scores):
        shape = None if features is None else features.shape
        raise DataError(f"features {shape} for {len(inputs.scores)} samples: give one row a sample, from this data")
    if not np.isfinite(features).all():
        raise DataError("some features are not finite; build the teacher's cache again")
    return features
