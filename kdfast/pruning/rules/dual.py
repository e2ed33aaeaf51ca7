"""DUAL's draw: by the score and a Beta density over the label's mean probability, easier as more is pruned."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError
from kdfast.pruning.options import Only, Option, OptionValue
from kdfast.pruning.rules.base import FloatArray, RuleInputs, by_rank
from kdfast.pruning.rules.draw import draw_weighted

MEAN_P = "mean_p"
OPTIONS = {
    "c": Option(
        None,
        "how late easy samples come in as more is pruned; automatic: 5.5 up to 10 classes, 4 up to 100, 11 above",
        low=0,
        high=1000,
    ),
    "total": Option(15.0, "the constant C of the density, with a + b = C + 1", low=0, high=1e6),
    "anchors": Option(
        10,
        "number of highest scores that define mu",
        low=1,
        high=1e9,
        integer=True,
        only=Only("without mu", lambda options: options["mu"] is None),
    ),
    "mu": Option(
        None,
        "mean probability of the label over the anchors; automatic: measured on all samples",
        low=0,
        high=1,
    ),
}
# Probabilities are recorded as float16, which rounds values near 0 and 1 to 0 and 1.
_CLIP = 2.0**-12


def resolve_defaults(inputs: RuleInputs) -> dict[str, OptionValue]:
    """Return c for this number of classes, and mu measured on the highest scores of all samples."""
    top = by_rank(inputs.scores, inputs.ties)[: int(inputs.number("anchors"))]
    c = 5.5 if inputs.classes <= 10 else 4.0 if inputs.classes <= 100 else 11.0
    return {"c": c, "mu": float(_probabilities(inputs)[top].mean())}


def beta_parameters(mu: float, fraction: float, c: float, total: float = 15.0) -> tuple[float, float]:
    """Return a and b when `fraction` is kept: b = C (1 - mu) (1 - r^c), a = C + 1 - b, with r = 1 - fraction."""
    b = total * (1 - mu) * (1 - (1 - fraction) ** c)
    return total + 1 - b, b


def dual(inputs: RuleInputs) -> IntArray:
    """Draw without replacement with weights Beta(mean p_y; a, b) * score.

    mean p_y is the extra `mean_p`, clipped to [2^-12, 1 - 2^-12]. The more is pruned, the more of the density lies on
    easy samples, which have a high probability. Samples with a score of zero come last.

    Raises:
        DataError: A score is negative, so it is not DUAL's, or `mean_p` is not a probability.

    Source:
        Cho et al. 2025, Lightweight dataset pruning without full training via example difficulty and prediction
        uncertainty, section 4.3. The public code draws without a seed.
    """
    if len(inputs.scores) and inputs.scores.min() < 0:
        raise DataError(f"the rule dual draws by the score, but {inputs.scores.min():g} is negative: score with dual")
    p = np.clip(_probabilities(inputs), _CLIP, 1 - _CLIP)
    a, b = beta_parameters(inputs.number("mu"), inputs.fraction, inputs.number("c"), inputs.number("total"))
    with np.errstate(divide="ignore"):
        return draw_weighted(inputs, np.log(inputs.scores) + (a - 1) * np.log(p) + (b - 1) * np.log1p(-p))


def _probabilities(inputs: RuleInputs) -> FloatArray:
    p = inputs.extras[MEAN_P]
    if len(p) and not (p.min() >= 0 and p.max() <= 1):
        raise DataError(f"mean_p is in [{p.min():g}, {p.max():g}], not within 0 and 1: score with dual again")
    return p
