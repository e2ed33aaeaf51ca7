"""Scores from windows of consecutive epochs of the label's probability: DUAL and dynamic uncertainty."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kdfast.dynamics.reader import Float16Array
from kdfast.errors import UsageError
from kdfast.pruning.options import Option
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import ScoreInputs, ScoreResult, require_dynamics
from kdfast.pruning.scores.trajectory import average_by_blocks

DUAL_OPTIONS = {
    "window": Option(10, "number of epochs per window", low=2, high=1e6, integer=True),
    "first": Option(30, "number of epochs to use, from the first on", low=2, high=1e6, integer=True),
}
DYN_UNC_OPTIONS = {
    "window": Option(10, "number of epochs per window", low=2, high=1e6, integer=True),
    "fidelity": Option(
        "paper",
        "windows to average over: all (paper), or all that end before the last epoch (public code)",
        choices=("paper", "code"),
    ),
}


def dual(inputs: ScoreInputs) -> ScoreResult:
    """Mean over windows of std(p_y) * (1 - mean p_y), in the first epochs of training.

    Windows are all `window` consecutive epochs among the first `first`. The extra `mean_p` is the mean of p_y over the
    first `first` epochs, for the rule `dual`. The standard deviation has the divisor `window`; another divisor would
    scale all scores alike.

    Source:
        Cho et al., Lightweight Dataset Pruning without Full Training via Example Difficulty and Prediction
        Uncertainty, ICML 2025, section 4.2.
    """
    dynamics = require_dynamics(inputs, "dual")
    window = int(inputs.number("window"))
    first = min(int(inputs.number("first")), dynamics.epochs)
    check_window("dual", window, first)

    def uncertainty(run: int, samples: slice) -> FloatArray:
        p = dynamics.p_y(run)[:first, samples]
        total = np.zeros(p.shape[1])
        for part in _windows(p, window):
            total += part.std(axis=0) * (1 - part.mean(axis=0))
        return total / (first - window + 1)

    def mean(run: int, samples: slice) -> FloatArray:
        found: FloatArray = dynamics.p_y(run)[:first, samples].mean(axis=0, dtype=np.float64)
        return found

    extras = {"mean_p": average_by_blocks(dynamics, mean)}
    return ScoreResult(average_by_blocks(dynamics, uncertainty), extras, {"first": first})


def dyn_unc(inputs: ScoreInputs) -> ScoreResult:
    """Dynamic uncertainty: the mean over all windows of consecutive epochs of std(p_y).

    The standard deviation has the divisor `window` - 1, as in the public code. That code also multiplies the score by
    10, which changes no ranking, and does not use the last epoch (`fidelity=code`).

    Source:
        He et al., Large-scale Dataset Pruning with Dynamic Uncertainty, CVPR 2024 workshops.
    """
    dynamics = require_dynamics(inputs, "dyn-unc")
    window = int(inputs.number("window"))
    epochs = dynamics.epochs - (inputs.options["fidelity"] == "code")
    check_window("dyn-unc", window, epochs)

    def uncertainty(run: int, samples: slice) -> FloatArray:
        p = dynamics.p_y(run)[:epochs, samples]
        total = np.zeros(p.shape[1])
        for part in _windows(p, window):
            total += part.std(axis=0, ddof=1)
        return total / (epochs - window + 1)

    return ScoreResult(average_by_blocks(dynamics, uncertainty))


def check_window(method: str, window: int, epochs: int) -> None:
    """Check that a window fits into the epochs to use.

    Raises:
        UsageError: It does not.
    """
    if window > epochs:
        raise UsageError(
            f"{method} needs {window} epochs for a window, but there are {epochs}: record more with kdfast dynamics, "
            "or lower the option window"
        )


def _windows(p: Float16Array, window: int) -> Iterator[FloatArray]:
    """Yield all windows of consecutive epochs, float64 (window, N) each."""
    for start in range(len(p) - window + 1):
        yield p[start : start + window].astype(np.float64)
