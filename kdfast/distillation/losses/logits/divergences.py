"""Other divergences between the two networks' probabilities, and between their logits."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, Term, TermEntry
from kdfast.errors import UsageError
from kdfast.ops.kd_loss import kd_loss


class Divergence(Term):
    """A divergence of `kd_loss` with its factor T^2, mean over rows.

    Args:
        temperature: T of the probabilities.
        settings: Arguments of `kd_loss` that choose the divergence.
    """

    def __init__(self, temperature: float, **settings: Any) -> None:
        super().__init__()
        self.temperature, self.settings = temperature, settings

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        return kd_loss(student.logits, labels, teacher.logits, alpha=1.0, temperature=self.temperature, **self.settings)


class JensenShannon(Divergence):
    """T^2 (beta KL(teacher || m) + (1 - beta) KL(student || m)) with m = beta teacher + (1 - beta) student.

    Args:
        beta: In (0, 1); 1/2 is symmetric.
        temperature: T of the probabilities.
    """

    def __init__(self, beta: float, temperature: float) -> None:
        if not 0 < beta < 1:
            raise UsageError(f"the term jsd has beta {beta:g}: pass a number above 0 and below 1")
        super().__init__(temperature, divergence="jsd", jsd_beta=beta)


class LogitDistance(Term):
    """Mean squared difference of the logits."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        return F.mse_loss(student.logits, teacher.logits)


REVERSE = TermEntry(
    lambda shapes, options: Divergence(options["temperature"], direction="reverse"),
    "KL(student || teacher)",
    "Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024, equation 1",
    options={"temperature": 4.0},
)
JENSEN_SHANNON = TermEntry(
    lambda shapes, options: JensenShannon(options["beta"], options["temperature"]),
    "generalized Jensen-Shannon divergence",
    "Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024, equation 1",
    options={"beta": 0.5, "temperature": 4.0},
)
LOGIT_DISTANCE = TermEntry(
    lambda shapes, options: LogitDistance(),
    "mean squared difference of the logits",
    "Ba and Caruana, Do Deep Nets Really Need to be Deep?, NeurIPS 2014, equation 1",
)
