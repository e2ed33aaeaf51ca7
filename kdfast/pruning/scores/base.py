"""Interface of scores, and the checks they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kdfast.data.arrays import as_labels, as_matrix
from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.distributed.group import Distributed
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import DataError, UsageError
from kdfast.progress import Progress
from kdfast.pruning.options import Option, OptionValue
from kdfast.pruning.rules.base import FloatArray

if TYPE_CHECKING:
    from kdfast.nets.checkpoint import Model

Float32Array = npt.NDArray[np.float32]

# How to get an input, for messages.
HOW_TO_GET = {
    "cache": "a teacher's cache (make one with kdfast cache and pass `cache`)",
    "dynamics": "training dynamics (record them with kdfast dynamics and pass `dynamics`)",
    "teacher": "a network (make one with kdfast teacher flatten and pass `teacher` to kdfast score or kdfast prune; "
    "kdfast sweep takes the file of kdfast score as `scores`)",
}


@dataclass(frozen=True)
class ScoreInputs:
    """Inputs of a score; arrays are in the order of the training split.

    Attributes:
        labels: int64 (N,), classes of the training split.
        seed: Seed of the score's random draws.
        logits: float32 (N, C), the teacher's logits on the unaugmented samples, or None.
        features: float32 (N, D), inputs of the teacher's classifier, or None.
        dynamics: Recorded training dynamics, or None.
        device: Device for expensive computations.
        options: Options by name; the others have their defaults.
        source: The data, for scores that run a network on the images, or None.
        network: The network for such scores, or None.
        progress: Called with (done, total, note) by scores that take long, or None.
        distributed: This process among those that share the work, see `Score.is_shared`; all get all scores.
    """

    labels: IntArray
    seed: int
    logits: Float32Array | None = None
    features: Float32Array | None = None
    dynamics: Dynamics | None = None
    device: str = "cpu"
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    source: Source | None = None
    network: Model | None = None
    progress: Progress | None = None
    distributed: Distributed = field(default_factory=Distributed)

    def number(self, option: str) -> float:
        """Return an option's value as a float."""
        value = self.options[option]
        if value is None:
            raise UsageError(f"option {option} has no value: set it")
        return float(value)


@dataclass(frozen=True)
class ScoreResult:
    """Scores of all samples.

    Attributes:
        values: float64 (N,), higher = harder = kept first by the rule `hard`.
        extras: Further values per sample, float64 (N,) each, such as standard errors or inputs of the score's rule.
        used: Values of options that the score computed itself, such as the epoch; `compute_score` adds all others.
    """

    values: FloatArray
    extras: dict[str, FloatArray] = field(default_factory=dict)
    used: dict[str, OptionValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A score.

    Attributes:
        compute: The function.
        summary: One line for help.
        needs: `cache`, `dynamics` or both, of which one suffices; or `teacher`, a network. Empty: the labels suffice.
        rule: The selection rule it was published with.
        options: Options by name.
        extras: Names of the extras that it computes from dynamics, for rules.
    """

    compute: Callable[[ScoreInputs], ScoreResult]
    summary: str
    needs: frozenset[str] = frozenset()
    rule: str = "hard"
    options: Mapping[str, Option] = field(default_factory=dict)
    extras: frozenset[str] = frozenset()

    def usable_inputs(self, options: Mapping[str, OptionValue]) -> frozenset[str]:
        """Return the inputs that the score may read, of which it needs one.

        They are `needs`, restricted by the option `use`; or a network, if the option `network` is full.
        """
        if options.get("network") == "full":
            return frozenset({"teacher"})
        use = options.get("use")
        return self.needs if use is None else self.needs & {str(use)}

    def is_shared(self, options: Mapping[str, OptionValue]) -> bool:
        """Return whether several processes share the work: a network's passes over the images, or a Hessian."""
        return "teacher" in self.usable_inputs(options) or options.get("kind") == "self"


USE = Option(
    None,
    "what to compute the score from; automatic: the dynamics if there are any (moderate: the cache)",
    choices=("dynamics", "cache"),
)


def require_dynamics(inputs: ScoreInputs, method: str) -> Dynamics:
    """Return the dynamics.

    Raises:
        UsageError: There are none; the message names the command that records them.
    """
    if inputs.dynamics is None:
        raise UsageError(f"{method} needs {HOW_TO_GET['dynamics']}")
    return inputs.dynamics


def require_logits(inputs: ScoreInputs, method: str) -> Float32Array:
    """Return the teacher's logits.

    Raises:
        UsageError: There are none; the message names the command that makes them.
    """
    if inputs.logits is None:
        raise UsageError(f"{method} needs {HOW_TO_GET['cache']} for the teacher's logits")
    return inputs.logits


def require_features(inputs: ScoreInputs, method: str) -> Float32Array:
    """Return the teacher's features.

    Raises:
        UsageError: There are none; the message names the command that makes them.
    """
    if inputs.features is None and inputs.logits is not None:
        raise UsageError(
            f"{method} needs the teacher's features, and the cache was imported without: import the logits again, with "
            "the features"
        )
    if inputs.features is None:
        raise UsageError(f"{method} needs {HOW_TO_GET['cache']} for the teacher's features")
    return inputs.features


def use_dynamics(inputs: ScoreInputs, method: str) -> bool:
    """Return whether a score that accepts dynamics or a cache is computed from the dynamics.

    Raises:
        UsageError: There are neither dynamics nor a teacher's logits.
    """
    use = inputs.options.get("use")
    if use is not None:
        return use == "dynamics"
    if inputs.dynamics is None and inputs.logits is None:
        raise UsageError(f"{method} needs {HOW_TO_GET['dynamics']} or {HOW_TO_GET['cache']}")
    return inputs.dynamics is not None


def refuse_epochs(inputs: ScoreInputs, method: str) -> None:
    """Raise a UsageError if epochs are given for a score that is computed from a teacher's cache."""
    for name in ("epoch", "epochs"):
        if inputs.options.get(name) is not None:
            raise UsageError(
                f"option {name}={inputs.options[name]}: {method} of a teacher has no epochs; omit it, or use "
                f"{HOW_TO_GET['dynamics']}"
            )


def check_inputs(inputs: ScoreInputs) -> ScoreInputs:
    """Return the inputs with labels, logits and features as arrays that cover the same samples.

    Raises:
        DataError: They do not cover the same samples, are not numbers, or are not finite.
    """
    labels = as_labels(inputs.labels)
    n = len(labels)
    logits, features = (
        None if values is None else as_matrix(values, n, name)
        for name, values in (("logits", inputs.logits), ("features", inputs.features))
    )
    if logits is not None and int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"labels up to {labels.max()} for logits of {logits.shape[1]} classes: use a teacher of this data"
        )
    if inputs.dynamics is not None:
        inputs.dynamics.check_matches(labels)
    return replace(inputs, labels=labels, logits=logits, features=features)


def check_values(
    values: FloatArray, n: int, what: str, *, advice: str = "correct their computation, one finite number per sample"
) -> None:
    """Check that there is one finite value per sample.

    Args:
        values: The values.
        n: Number of samples.
        what: What the values are, for messages.
        advice: The end of messages, what to do.

    Raises:
        DataError: There is not.
    """
    if values.shape != (n,):
        raise DataError(f"{what}: the shape is {values.shape} for {n} samples: {advice}")
    if values.dtype.kind not in "fiu":
        raise DataError(f"{what}: the values are {values.dtype}, not real numbers: {advice}")
    if not np.isfinite(values).all():
        raise DataError(f"{what}: {int((~np.isfinite(values)).sum())} of {n} values are not finite: {advice}")
