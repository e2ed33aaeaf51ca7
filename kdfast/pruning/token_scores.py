"""Scores of the tokens of texts, and of the texts, from a cache of a language model's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.errors import UsageError, look_up
from kdfast.ops.kd_loss.offline import rank_bound, tempered_tail
from kdfast.teacher.tokens.read import TokenRows, TokenTeacher

__all__ = ["TokenScores", "token_scores"]

Floats = npt.NDArray[np.float64]


class TokenScores(NamedTuple):
    """A number for each of N tokens, text after text; higher = harder. NaN where the token or the teacher is unknown.

    Attributes:
        values: float64 (N,). Exact but for the rounding of the stored log-probabilities where ``low`` equals ``high``;
            else an estimate between them.
        low: float64 (N,) least value that agrees with the stored entries.
        high: float64 (N,) no value that agrees with them is larger.
        lengths: int64 (S,) tokens of each text.
        numbers: int64 (S,) number of each text.
    """

    values: Floats
    low: Floats
    high: Floats
    lengths: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]

    def texts(self) -> Floats:
        """Return the mean over the known tokens of each text, (S,); NaN for texts without any."""
        known = np.isfinite(self.values)
        count, total = np.zeros(len(self.lengths), np.int64), np.zeros(len(self.lengths))
        some = self.lengths > 0  # np.add.reduceat takes no empty parts
        starts = (np.cumsum(self.lengths) - self.lengths)[some]
        count[some] = np.add.reduceat(known.astype(np.int64), starts)
        total[some] = np.add.reduceat(np.where(known, self.values, 0), starts)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def token_scores(teacher: TokenTeacher, method: str = "ce") -> TokenScores:
    """Score the tokens of texts by a teacher's stored log-probabilities.

    - "ce": the teacher's cross-entropy, -log p of the token. If the token is not among the stored classes, p is at most
      their smallest and at most the mass of the others; the estimate shares that mass evenly among them.
    - "el2n": the distance of the teacher's distribution from the token, ||p - onehot||, with the sum of p^2 over the
      classes left out bounded and estimated as by `kdfast.ops.kd_loss.offline.tempered_tail`. Its square is exact up to
      m R, for their mass R and their largest probability m, if the token is among the stored classes.

    Both are at the temperature of the log-probabilities.

    Args:
        teacher: The cache; its texts must have been stored with their tokens.
        method: "ce" or "el2n".

    Raises:
        UsageError: The method does not exist, or the cache does not hold the tokens of the texts, or holds draws.
        CacheMismatch: The cache is damaged.

    Source: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet", 2021 (EL2N), https://arxiv.org/abs/2107.07075.
    """
    compute = look_up(_METHODS, method, "score of tokens")
    if teacher.sampled:
        raise UsageError(
            f"{teacher.path} holds classes that were drawn at random, which do not tell the probability of a token: "
            "pass a cache of log-probabilities"
        )
    if not teacher.has_labels:
        raise UsageError(
            f"{teacher.path} does not hold the tokens of the texts, which scores need: write it again, with `labels`"
        )
    parts = [_score(compute, rows, teacher.vocabulary) for rows in teacher.blocks()]
    values, low, high = (torch.cat(found).numpy() for found in zip(*parts, strict=True))
    return TokenScores(values, low, high, teacher.lengths, teacher.numbers)


class _Facts(NamedTuple):
    """What is known of M tokens, all float64 (M,) but p and own: the probabilities and which is the token's, (M, k)."""

    p: Tensor
    own: Tensor
    rest: Tensor
    others: Tensor
    most: Tensor
    rank: Tensor


_Scores = tuple[Tensor, Tensor, Tensor]  # value, low and high, float64 (M,)


def _score(compute: Callable[[_Facts], _Scores], rows: TokenRows, vocabulary: int) -> _Scores:
    stored = ~torch.isneginf(rows.values)
    p = rows.values.double().exp()
    others = (vocabulary - stored.sum(1)).double()
    most, rank = rank_bound(rows.values, rows.ranks)
    own = stored & (rows.ids == rows.labels.unsqueeze(1))
    facts = _Facts(p, own, rows.tail, others, most, rank)
    known = (rows.labels >= 0) & stored.any(1)
    value, low, high = (torch.where(known, score, torch.nan) for score in compute(facts))
    return value, low, high


def _largest_other(facts: _Facts) -> Tensor:
    """Return the largest probability that a class left out can have."""
    return torch.minimum(facts.most, facts.rest).exp()


def _cross_entropy(facts: _Facts) -> _Scores:
    is_stored = facts.own.any(1)
    exact = -torch.where(facts.own, facts.p, 0).sum(1).log()
    even = facts.others.log() - facts.rest
    low = -_largest_other(facts).log()
    return (
        torch.where(is_stored, exact, torch.maximum(even, low)),
        torch.where(is_stored, exact, low),
        torch.where(is_stored, exact, torch.inf),
    )


def _el2n(facts: _Facts) -> _Scores:
    squares = tempered_tail(facts.rest, facts.most, facts.rank, facts.others, 2.0)
    stored = (facts.p - facts.own.double()).square().sum(1)
    is_stored = facts.own.any(1)
    # A token that is left out: (1 - p)^2 in place of p^2, with p from 0 to the largest.
    largest = _largest_other(facts)
    even = (facts.rest.exp() / facts.others.clamp_min(1)).minimum(largest)
    estimate = stored + squares.estimate.exp() + torch.where(is_stored, 0, 1 - 2 * even)
    least = torch.where(is_stored, squares.low.exp(), squares.low.exp().maximum(largest.square()) + 1 - 2 * largest)
    low = stored + least
    high = stored + squares.high.exp() + torch.where(is_stored, 0.0, 1.0)
    return estimate.clamp_min(0).sqrt(), low.clamp_min(0).sqrt(), high.sqrt()


_METHODS = {"ce": _cross_entropy, "el2n": _el2n}
