"""The weight of the divergence from the teacher, by the kept fraction."""

from __future__ import annotations

import math

from kdfast.errors import UsageError

# (kept fraction, alpha): interpolated linearly, constant outside.
ALPHA_ANCHORS = ((0.1, 1.0), (0.7, 0.5))


def compute_alpha(fraction: float) -> float:
    """Return the weight of the distillation term, which grows as the kept fraction shrinks (alpha `auto`).

    The source reports that alpha = 1 beats alpha = 0.5 by a wide margin when a tenth of the data is kept, and that
    alpha = 0.5 is better when seven tenths are kept. This rule interpolates linearly between these two results and is
    constant outside: 1 up to a tenth, 0.5 from seven tenths on.

    Args:
        fraction: Kept fraction of the training set, in (0, 1].

    Returns:
        alpha in [0.5, 1].

    Raises:
        UsageError: If the fraction lies outside (0, 1].

    Source:
        Ben-Baruch et al., Distilling the Knowledge in Data Pruning, ICML 2025, section on the KD weight.

    Example:
        >>> compute_alpha(0.1), round(compute_alpha(0.4), 3), compute_alpha(1.0)
        (1.0, 0.75, 0.5)
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"`fraction` is {fraction}: pass a number in (0, 1]")
    (low, high_alpha), (high, low_alpha) = ALPHA_ANCHORS
    share = min(max((fraction - low) / (high - low), 0.0), 1.0)
    return high_alpha + share * (low_alpha - high_alpha)


def parse_alpha(text: str, fraction: float, most: float = 1.0) -> float:
    """Parse alpha: a number from 0 to `most`, or `auto` for `compute_alpha`.

    Raises:
        UsageError: If the text is neither.
    """
    if text == "auto":
        return compute_alpha(fraction)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most or not math.isfinite(value):
        interval = "in [0, 1]" if most == 1 else "of at least 0"
        raise UsageError(f"`alpha` is {text!r}: pass a number {interval}, or auto")
    return value
