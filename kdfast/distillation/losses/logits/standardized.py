"""Logit standardization: each row of logits gets mean 0 and standard deviation 1 before the softmax."""

from __future__ import annotations

from torch import Tensor

from kdfast.distillation.losses.base import Outputs, TermEntry
from kdfast.distillation.losses.logits.decoupled import Decoupled
from kdfast.distillation.losses.logits.divergences import Divergence

EPSILON = 1e-7


def standardize(logits: Tensor) -> Tensor:
    """Return (z - mean) / (std + 1e-7) of each row, with the unbiased standard deviation.

    Source:
        Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, algorithm 1.
    """
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + EPSILON)


class StandardizedDecoupled(Decoupled):
    """DKD of standardized logits."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        return super().forward(Outputs(standardize(student.logits)), Outputs(standardize(teacher.logits)), labels)


STANDARDIZED = TermEntry(
    lambda shapes, options: Divergence(options["temperature"], divergence="standardized"),
    "divergence of logits with mean 0 and standard deviation 1",
    "Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024",
    options={"temperature": 2.0},
    tuned=9.0,
)
STANDARDIZED_DECOUPLED = TermEntry(
    lambda shapes, options: StandardizedDecoupled(options["alpha"], options["beta"], options["temperature"]),
    "DKD of logits with mean 0 and standard deviation 1",
    "Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024",
    options={"alpha": 1.0, "beta": 8.0, "temperature": 2.0},
    tuned=9.0,
    labels=True,
)
