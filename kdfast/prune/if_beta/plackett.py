"""The gradient of a draw's log-probability in the parameters of the policy.

A draw without replacement takes sample j_1, then j_2 from what is left, ...; its probability is the product of
w(j_k) / (sum of w over what is left at k). With log-weights (a - 1) ln u + (b - 1) ln(1 - u) and s = (ln u, ln(1 - u)),

    grad log p = sum_k [ s(j_k) - E_left(k) s ]    in (a, b),    times (a, b) in phi = (ln a, ln b)

where E_left(k) weighs what is left at k, j_k included. The sums over what is left are suffix sums of the drawn samples
plus one sum over the samples never drawn.

Source: Plackett 1975, The analysis of permutations; Williams 1992 for its use as a gradient estimator.
"""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.prune.if_beta.policy import Design, FloatArray


def log_probability_gradient(design: Design, drawn: IntArray, a: float, b: float) -> FloatArray:
    """Gradient of ln p(drawn) in (ln a, ln b).

    Args:
        design: Ranks, strata and budgets.
        drawn: int64 (total,), a result of `Design.draw`: stratum after stratum, in the order drawn.
        a: First parameter.
        b: Second parameter.

    Returns:
        float64 (2,).
    """
    log_weights = design.log_weights(a, b)
    ends = np.cumsum(design.budgets)
    total = np.zeros(2)
    for stratum, (end, budget) in enumerate(zip(ends, design.budgets, strict=True)):
        sequence = drawn[end - budget : end]
        members = np.flatnonzero(design.strata == stratum)
        weights = np.exp(log_weights - log_weights[members].max())
        rest = np.setdiff1d(members, sequence, assume_unique=True)
        s, w = design.log_ranks[sequence], weights[sequence, None]
        mass = _suffix_sums(w) + weights[rest].sum()
        moment = _suffix_sums(w * s) + weights[rest] @ design.log_ranks[rest]
        total += (s - moment / mass).sum(0)
    gradient: FloatArray = total * np.array([a, b])
    return gradient


def _suffix_sums(x: FloatArray) -> FloatArray:
    sums: FloatArray = x[::-1].cumsum(0)[::-1]
    return sums
