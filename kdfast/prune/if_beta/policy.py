"""The policy: which samples a Beta density over the ranks of a score draws.

A sample of rank u in (0, 1) has log-weight (a - 1) ln u + (b - 1) ln(1 - u). Each stratum (a class, or everything)
gives up its budget by the largest log-weight + Gumbel noise, which is exactly drawing without replacement with
probability in proportion to the weights among what is left (Plackett-Luce). The noise is a hash of (seed, step, draw,
sample): one draw of one step can be had without the others, and two policies can be compared under the same noise.

Source: Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", ICML 2019, section 2,
https://arxiv.org/abs/1903.06059.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdfast.data.stateless_random import IntArray, Purpose, hash64, unit
from kdfast.data.subset import class_budgets

FloatArray = NDArray[np.float64]

# Outside these the density is a spike that no draw of a few per cent resolves, and the logarithms of its weights
# outgrow the noise.
LOWEST, HIGHEST = 0.05, 50.0


def average_ranks(values: FloatArray, strata: IntArray) -> FloatArray:
    """Ranks within each stratum as u = (rank - 1/2) / size; tied values share the mean of their ranks.

    Args:
        values: float64 (n,), finite scores.
        strata: int64 (n,), the stratum of each sample, from 0.

    Returns:
        float64 (n,) in (0, 1), increasing with the score.
    """
    order = np.lexsort((values, strata))
    ordered, groups = values[order], strata[order]
    size = np.bincount(strata)
    first = np.r_[True, (ordered[1:] != ordered[:-1]) | (groups[1:] != groups[:-1])]
    starts = np.flatnonzero(first)
    ends = np.r_[starts[1:], len(values)]
    # Positions starts..ends-1 hold the 1-based ranks starts+1..ends, whose mean is (starts + ends + 1) / 2.
    middle = np.repeat((starts + ends) / 2, ends - starts)
    offset = np.concatenate([[0], np.cumsum(size)[:-1]])
    u = np.empty(len(values))
    u[order] = (middle - offset[groups]) / size[groups]
    return u


@dataclass(frozen=True)
class Design:
    """What does not change while a policy is learned: the samples' ranks, their strata and the strata's budgets.

    Attributes:
        ids: int64 (n,), original index of each sample; the noise depends on it, so a sample keeps its noise wherever it
            stands.
        strata: int64 (n,), from 0; classes, or all zero.
        log_ranks: float64 (n, 2), (ln u, ln(1 - u)): the statistics of the Beta density.
        budgets: int64 (strata,), how many samples of each stratum to draw.
    """

    ids: IntArray
    strata: IntArray
    log_ranks: FloatArray
    budgets: IntArray

    @classmethod
    def of(
        cls,
        u: FloatArray,
        ids: IntArray,
        strata: IntArray,
        total: int,
        mode: Literal["proportional", "equal"] = "proportional",
    ) -> Design:
        """Make a design.

        Args:
            u: float64 (n,), ranks in (0, 1).
            ids: int64 (n,), original indices.
            strata: int64 (n,), from 0.
            total: Samples to draw in all.
            mode: Budgets in proportion to the strata, or equal.

        Raises:
            SubsetError: `total` leaves a stratum empty, or needs more of one than there is.
        """
        return cls(ids, strata, np.stack([np.log(u), np.log1p(-u)], 1), class_budgets(strata, total, mode))

    def log_weights(self, a: float, b: float) -> FloatArray:
        """Log-weights of the samples under Beta(a, b), float64 (n,), without the normalising constant."""
        weights: FloatArray = self.log_ranks @ np.array([a - 1, b - 1])
        return weights

    def gumbel(self, seed: int, step: int, draw: int) -> FloatArray:
        """Standard Gumbel noise, float64 (n,), for one draw of one step of a run."""
        uniform = unit(hash64(Purpose.RULE, seed, step, draw, self.ids))
        return -np.log(-np.log(np.maximum(uniform, 2.0**-54)))

    def draw(self, a: float, b: float, noise: FloatArray) -> IntArray:
        """Draw without replacement.

        Args:
            a: First parameter, > 0; above 1 it moves mass away from the lowest ranks.
            b: Second parameter, > 0; above 1 it moves mass away from the highest ranks.
            noise: float64 (n,) from `gumbel`.

        Returns:
            int64 (total,), positions into `ids`: stratum after stratum, in the order drawn.
        """
        keys = self.log_weights(a, b) + noise
        order = np.lexsort((-keys, self.strata))
        starts = np.concatenate([[0], np.cumsum(np.bincount(self.strata))[:-1]])
        return np.concatenate([order[s : s + m] for s, m in zip(starts, self.budgets, strict=True)])
