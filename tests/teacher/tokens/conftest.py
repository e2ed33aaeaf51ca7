"""Texts with a teacher's log-probabilities, made from full distributions that the tests keep."""

from dataclasses import dataclass

import pytest
import torch

VOCABULARY = 50


@dataclass
class Text:
    """Log-probabilities (L, V) of a teacher at each token, and the tokens."""

    logp: torch.Tensor
    tokens: list[int]

    def top(self, k):
        """Classes and log-probabilities of the k most probable classes of each token, as lists of pairs."""
        return [[(int(c), float(v)) for v, c in zip(*row.topk(k), strict=True)] for row in self.logp]


def make_texts(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [
        Text(
            torch.randn(length, VOCABULARY, generator=generator, dtype=torch.float64).mul(2).log_softmax(1),
            torch.randint(VOCABULARY, (length,), generator=generator).tolist(),
        )
        for length in lengths
    ]


@pytest.fixture
def texts():
    return make_texts()


@pytest.fixture
def many_texts():
    return make_texts(60)
