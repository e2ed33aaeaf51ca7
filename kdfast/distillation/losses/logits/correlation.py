"""DIST: correlations of the probabilities over the classes of a sample, and over the samples of a batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, Term, TermEntry
from kdfast.errors import UsageError


class Correlation(Term):
    """T^2 (beta * (1 - mean correlation of the rows) + gamma * (1 - mean correlation of the columns)).

    Args:
        beta: Weight of the rows: how a sample relates to the classes.
        gamma: Weight of the columns: how a class relates to the samples of the batch.
        temperature: T of the probabilities.
    """

    def __init__(self, beta: float, gamma: float, temperature: float) -> None:
        if beta < 0 or gamma < 0:
            raise UsageError(f"the term dist has beta {beta:g} and gamma {gamma:g}: pass numbers of at least 0")
        super().__init__()
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        ours, theirs = ((x.logits / self.temperature).softmax(1) for x in (student, teacher))
        rows, columns = _decorrelation(ours, theirs), _decorrelation(ours.mT, theirs.mT)
        return self.temperature**2 * (self.beta * rows + self.gamma * columns)


def _decorrelation(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 minus the mean over the rows of Pearson's correlation of `a` and `b`."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return 1 - F.cosine_similarity(a, b, dim=1).mean()


CORRELATION = TermEntry(
    lambda shapes, options: Correlation(options["beta"], options["gamma"], options["temperature"]),
    "correlations over classes and over the batch",
    "Huang et al., Knowledge Distillation from a Stronger Teacher, NeurIPS 2022, equations 7 to 10",
    options={"beta": 1.0, "gamma": 1.0, "temperature": 4.0},
    relates=True,
)
