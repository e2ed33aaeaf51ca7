"""Weighted draws without replacement, seeded per sample."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray, Purpose, hash64, uniform
from kdfast.pruning.rules.base import FloatArray, RuleInputs


def rule_uniform(seed: int, ids: IntArray) -> FloatArray:
    """Return one uniform number above 0 per sample, float64 (n,): a hash of the seed and the sample's index."""
    return uniform(hash64(Purpose.RULE, seed, ids)) + 2.0**-54


def gumbel_noise(uniforms: FloatArray) -> FloatArray:
    """Transform uniform numbers in (0, 1) to standard Gumbel noise."""
    return -np.log(-np.log(uniforms))


def gumbel_top_k(
    log_weights: FloatArray, noise: FloatArray, counts: IntArray, strata: IntArray, ties: FloatArray | None = None
) -> IntArray:
    """Draw from each stratum without replacement, in proportion to the weights of the samples left.

    The k highest values of log-weight + Gumbel noise follow this distribution (Plackett-Luce). Samples of weight zero
    come last.

    Args:
        log_weights: float64 (n,), up to a constant; -inf for a weight of zero.
        noise: float64 (n,), standard Gumbel noise.
        counts: int64 (strata,), samples to draw from each stratum.
        strata: int64 (n,), each sample's stratum, from 0.
        ties: float64 (n,), the lower first among equal values; by default the lower position first.

    Returns:
        int64 (counts.sum(),), positions: stratum by stratum, each in the order drawn.

    Source:
        Kool, van Hoof and Welling 2019, Stochastic beams and where to find them, section 2.
    """
    keys = -(log_weights + noise)
    order = np.lexsort((keys, strata) if ties is None else (ties, keys, strata))
    ends = np.cumsum(np.bincount(strata, minlength=len(counts)))
    starts = ends - np.diff(ends, prepend=0)
    return np.concatenate([order[start : start + count] for start, count in zip(starts, counts, strict=True)])


def draw_weighted(inputs: RuleInputs, log_weights: FloatArray) -> IntArray:
    """Draw `count` samples of a group with `gumbel_top_k`.

    The noise is a hash of the seed and the sample's index, so a sample has the same noise in every group.

    Args:
        inputs: The group.
        log_weights: float64 (n,), up to a constant; -inf for a weight of zero.
    """
    noise = gumbel_noise(rule_uniform(inputs.seed, inputs.ids))
    one_stratum = np.zeros(len(log_weights), np.int64)
    return gumbel_top_k(log_weights, noise, np.array([inputs.count]), one_stratum, inputs.ties)
