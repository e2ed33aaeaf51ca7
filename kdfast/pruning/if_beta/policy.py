"""The sampling policy: draw samples without replacement, weighted by a Beta density over the ranks of their scores.

A sample of rank u in (0, 1) has the log-weight (a - 1) ln u + (b - 1) ln(1 - u). Each stratum (a class, or the whole
data set) is drawn from separately, by `kdfast.pruning.rules.draw.gumbel_top_k`. The Gumbel noise is a hash of (seed,
step, draw, sample), so any draw of any step can be computed alone, and two policies can be compared under the same
noise.

The sequence j_1, j_2, ... has probability prod_k w(j_k) / (sum of w over the samples remaining at k). With
s = (ln u, ln(1 - u)), its logarithm has the gradient

    sum_k [ s(j_k) - E_k s ]    in (a, b),    times (a, b) in phi = (ln a, ln b)

where E_k is the weighted mean over the samples remaining at k, j_k included. Sums over these are suffix sums over the
drawn samples plus one sum over the samples never drawn.

Sources: Plackett 1975, "The analysis of permutations"; Kool, van Hoof and Welling, "Stochastic Beams and Where to Find
Them", ICML 2019, section 2, https://arxiv.org/abs/1903.06059; Williams 1992 for the gradient's use in an estimator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdfast.data.arrays import group_by_class
from kdfast.data.stateless_random import IntArray, Purpose, hash64, uniform
from kdfast.data.subset import class_budgets
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.rules.beta import mid_ranks
from kdfast.pruning.rules.draw import gumbel_noise, gumbel_top_k

# Beyond these bounds the density is a spike that a draw of a few per cent cannot resolve, and the log-weights dwarf the
# noise.
MIN_PARAMETER, MAX_PARAMETER = 0.05, 50.0


def average_ranks(values: FloatArray, strata: IntArray) -> FloatArray:
    """Return ranks within each stratum as u = (rank - 1/2) / size; ties share their mean rank.

    Args:
        values: float64 (n,), finite scores.
        strata: int64 (n,), the stratum of each sample, from 0.

    Returns:
        float64 (n,) in (0, 1), increasing with the score.
    """
    u = np.empty(len(values))
    order = np.argsort(strata, kind="stable")
    for members in np.split(order, np.cumsum(np.bincount(strata))[:-1]):
        u[members] = mid_ranks(values[members])
    return u


@dataclass(frozen=True)
class StratifiedSampler:
    """Draws a fixed number of samples from each stratum under Beta(a, b); constant during a search.

    Attributes:
        ids: int64 (n,), index of each sample in the training split. The noise is a function of it, so a sample has the
            same noise at every position.
        strata: int64 (n,), from 0; the classes, or all zero.
        log_ranks: float64 (n, 2), (ln u, ln(1 - u)): the sufficient statistics of the Beta density.
        counts: int64 (strata,), number of samples to draw from each stratum.
    """

    ids: IntArray
    strata: IntArray
    log_ranks: FloatArray
    counts: IntArray

    @classmethod
    def from_ranks(
        cls,
        u: FloatArray,
        ids: IntArray,
        strata: IntArray,
        total: int,
        mode: Literal["proportional", "equal"] = "proportional",
    ) -> StratifiedSampler:
        """Make a sampler of `total` samples.

        Args:
            u: float64 (n,), ranks in (0, 1).
            ids: int64 (n,), indices into the training split.
            strata: int64 (n,), from 0.
            total: Number of samples to draw.
            mode: Draw from the strata in proportion to their sizes, or equally.

        Raises:
            SubsetError: `total` leaves a stratum empty, or requires more of a stratum than it has.
        """
        return cls(ids, strata, np.stack([np.log(u), np.log1p(-u)], 1), class_budgets(strata, total, mode))

    def log_weights(self, a: float, b: float) -> FloatArray:
        """Return the unnormalized log-weights of the samples under Beta(a, b), float64 (n,)."""
        weights: FloatArray = self.log_ranks @ np.array([a - 1, b - 1])
        return weights

    def gumbel(self, seed: int, step: int, draw: int) -> FloatArray:
        """Return standard Gumbel noise for one draw of one step, float64 (n,)."""
        uniforms = uniform(hash64(Purpose.RULE, seed, step, draw, self.ids))
        return gumbel_noise(np.maximum(uniforms, 2.0**-54))

    def draw(self, a: float, b: float, noise: FloatArray) -> IntArray:
        """Draw samples without replacement.

        Args:
            a: First parameter, > 0; values above 1 move mass away from the lowest ranks.
            b: Second parameter, > 0; values above 1 move mass away from the highest ranks.
            noise: float64 (n,) from `gumbel`.

        Returns:
            int64 (total,), positions into `ids`: stratum by stratum, each in the order drawn.
        """
        return gumbel_top_k(self.log_weights(a, b), noise, self.counts, self.strata)

    def log_probability_gradient(self, drawn: IntArray, a: float, b: float) -> FloatArray:
        """Return the gradient of ln p(drawn) in phi = (ln a, ln b).

        Args:
            drawn: int64 (total,), a result of `draw`.
            a: First parameter.
            b: Second parameter.

        Returns:
            float64 (2,).
        """
        log_weights = self.log_weights(a, b)
        ends = np.cumsum(self.counts)
        total = np.zeros(2)
        for stratum, members in group_by_class(self.strata).items():
            end, count = ends[stratum], self.counts[stratum]
            sequence = drawn[end - count : end]
            highest = log_weights[members].max()
            rest = np.setdiff1d(members, sequence, assume_unique=True)
            s, w = self.log_ranks[sequence], np.exp(log_weights[sequence, None] - highest)
            others = np.exp(log_weights[rest] - highest)
            mass = _suffix_sums(w) + others.sum()
            moment = _suffix_sums(w * s) + others @ self.log_ranks[rest]
            total += (s - moment / mass).sum(0)
        gradient: FloatArray = total * np.array([a, b])
        return gradient


def _suffix_sums(x: FloatArray) -> FloatArray:
    sums: FloatArray = x[::-1].cumsum(0)[::-1]
    return sums
