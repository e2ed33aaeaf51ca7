"""Interface of selection rules, and what they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kdfast.data.arrays import rows_of
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError
from kdfast.files.arrays import row_blocks
from kdfast.pruning.options import Option, OptionValue

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RuleInputs:
    """A group of samples to select from: one class, or all samples.

    Attributes:
        scores: float64 (n,), finite; higher = harder.
        ties: float64 (n,), seeded numbers that order samples of equal score.
        count: Number of samples to keep, in [0, n].
        fraction: Share of the whole training split to keep.
        seed: Seed of the rule's random draws.
        ids: int64 (n,), indices into the training split; draws depend on them and not on the grouping.
        features: float32 (n, D), or None.
        extras: Further values per sample, float64 (n,) each, that the score computed for its rule.
        options: Every option of the rule, checked.
        classes: Number of classes of the training split.
        device: Device for expensive computations.
        labels: int64 (n,), classes in [0, `classes`), or None. Needed only by rules that train a classifier.
        budgets: int64 (`classes`,), the samples to keep of each class, for `resolve_defaults` and `pool`; None if all
            samples are ranked together.
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
    labels: IntArray | None = None
    budgets: IntArray | None = None

    def number(self, option: str) -> float:
        """Return an option's value as a float; NaN if it has no value yet."""
        value = self.options.get(option)
        return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Rule:
    """A selection rule. Call it with `RuleInputs` to get int64 (count,) positions into the group.

    Attributes:
        select: The function.
        summary: What it keeps, one line for help.
        options: Options by name.
        needs: Required inputs: "features", or names of extras.
        needs_with: The extra that a value of an option requires, by (option, value).
        resolve_defaults: Return values for the options whose default is None, given all samples as one group; every
            group is then selected with these values. None if there are no such options.
        defaults_need_features: Whether these defaults depend on the features.
        pool: Return the positions, int64 and ascending, of the samples that remain after a cut across classes, given
            all samples as one group; at least `count` of them, and one of each class if there are budgets. Budgets are
            then filled from these. None: from all samples.
    """

    select: Callable[[RuleInputs], IntArray]
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    needs_with: Mapping[tuple[str, OptionValue], str] = field(default_factory=dict)
    resolve_defaults: Callable[[RuleInputs], dict[str, OptionValue]] | None = None
    pool: Callable[[RuleInputs], IntArray] | None = None
    defaults_need_features: bool = False

    def __call__(self, inputs: RuleInputs) -> IntArray:
        """Return the positions of the samples to keep."""
        return self.select(inputs)

    def required(self, options: Mapping[str, OptionValue]) -> frozenset[str]:
        """Return the required inputs with these options, of which all have a value."""
        return self.needs | {need for (name, value), need in self.needs_with.items() if options[name] == value}

    def with_defaults(self, inputs: RuleInputs) -> RuleInputs:
        """Return all samples as one group, with a value for every option."""
        if self.resolve_defaults is None or None not in inputs.options.values():
            return inputs
        defaults = self.resolve_defaults(inputs)
        options = {name: defaults[name] if value is None else value for name, value in inputs.options.items()}
        return replace(inputs, options=options)


def by_rank(keys: FloatArray, ties: FloatArray) -> IntArray:
    """Return positions in descending order of `keys`, equal keys in ascending order of `ties`; int64 (n,)."""
    return np.lexsort((ties, -keys))


def drop_hardest(inputs: RuleInputs, share: float) -> IntArray:
    """Return the group's positions, hardest first, without the hardest `share`; at least `count` remain."""
    order = by_rank(inputs.scores, inputs.ties)
    return order[min(round(share * len(order)), len(order) - inputs.count) :]


def require_features(inputs: RuleInputs) -> npt.NDArray[np.float32]:
    """Return the group's features, contiguous; other real numbers are converted to float32.

    Raises:
        DataError: The features are missing, not (n, D), or not finite.
    """
    features = None if inputs.features is None else np.ascontiguousarray(inputs.features, np.float32)
    if features is None or features.ndim != 2 or len(features) != len(inputs.scores):
        shape = None if features is None else features.shape
        raise DataError(f"features {shape} for {len(inputs.scores)} samples: pass one row per sample, from this data")
    if not all(np.isfinite(block).all() for _, block in row_blocks(features, rows_of(features))):
        raise DataError("some features are not finite: build the teacher's cache again")
    return features
