"""Schedules: the weight of the teacher as a function of the kept fraction, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from kdfast.errors import UsageError

# (kept fraction, alpha), joined by straight lines and constant outside.
ALPHA_ANCHORS = ((0.1, 1.0), (0.7, 0.5))

# Where the step schedule divides the rate by ten, as shares of the run: epochs 150, 180 and 210 of 240.
STEP_MILESTONES = (150 / 240, 180 / 240, 210 / 240)


def alpha_for_fraction(fraction: float) -> float:
    """The weight of the teacher's term, growing as the kept fraction shrinks (`--alpha auto`).

    The source reports that alpha = 1 beats alpha = 0.5 by a wide margin when a tenth of the data is kept, and that
    0.5 is the better of the two when seven tenths are. The rule takes these two findings as its anchors, interpolates
    linearly between them and is constant outside: 1 up to a tenth, 0.5 from seven tenths on.

    Args:
        fraction: Share of the training set that is kept, in (0, 1].

    Returns:
        alpha in [0.5, 1].

    Raises:
        UsageError: If the fraction lies outside (0, 1].

    Source:
        Ben-Baruch et al., Distilling the Knowledge in Data Pruning, ICML 2025, section on the KD weight.

    Example:
        >>> alpha_for_fraction(0.1), round(alpha_for_fraction(0.4), 3), alpha_for_fraction(1.0)
        (1.0, 0.75, 0.5)
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"fraction is {fraction}; it must lie in (0, 1]")
    (low, high_alpha), (high, low_alpha) = ALPHA_ANCHORS
    share = min(max((fraction - low) / (high - low), 0.0), 1.0)
    return high_alpha + share * (low_alpha - high_alpha)


def parse_alpha(text: str, fraction: float) -> float:
    """Read `--alpha`: a number in [0, 1], or `auto` for `alpha_for_fraction`.

    Raises:
        UsageError: If it is neither.
    """
    if text == "auto":
        return alpha_for_fraction(fraction)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise UsageError(f"--alpha is {text!r}; give a number in [0, 1], or auto")
    return value


def step_decay(progress: float) -> float:
    """The recipe of the source: a tenth after 62.5%, 75% and 87.5% of the run (epochs 150, 180, 210 of 240)."""
    return float(0.1 ** sum(progress >= m for m in STEP_MILESTONES))


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """No decay."""
    return 1.0


LR_SCHEDULES: dict[str, Callable[[float], float]] = {"step": step_decay, "cosine": cosine, "constant": constant}


def learning_rate(base: float, schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """Learning rate of one step: a linear warm-up, then the schedule over what remains.

    Args:
        base: Highest rate.
        schedule: A key of `LR_SCHEDULES`.
        step: Steps done so far.
        total: Steps of the whole run.
        warmup: Steps of the warm-up.

    Returns:
        The rate for the step.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return base * LR_SCHEDULES[schedule]((step - warmup) / max(total - warmup, 1))
