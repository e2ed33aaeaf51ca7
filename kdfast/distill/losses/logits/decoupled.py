"""DKD: the divergence of target against all other classes, and that among the other classes, weighted apart."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.distill.losses.base import Outputs, Term, TermEntry


class Decoupled(Term):
    """alpha T^2 KL of (p_y, 1 - p_y) plus beta T^2 KL of the distributions over the other classes; mean over rows.

    Args:
        alpha: Weight of the first.
        beta: Weight of the second.
        temperature: T.
    """

    def __init__(self, alpha: float, beta: float, temperature: float) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        target, others = decoupled_divergences(student.logits, teacher.logits, labels, self.temperature)
        return self.temperature**2 * (self.alpha * target + self.beta * others).mean()


def decoupled_divergences(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return both divergences of the teacher from the student at a temperature, without the factor T^2.

    Args:
        student: (B, C) logits.
        teacher: (B, C) logits.
        labels: int64 (B,).
        temperature: T.

    Returns:
        (B,) each: KL between (p_y, 1 - p_y), and KL between the distributions over the classes other than y.

    Source:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, equations 5 to 7.
    """
    s_pair, s_others = _split(student / temperature, labels)
    t_pair, t_others = _split(teacher / temperature, labels)
    target = (t_pair.exp() * (t_pair - s_pair)).sum(1)
    others = (t_others.exp() * (t_others - s_others)).masked_fill(_is_target(student, labels), 0).sum(1)
    return target, others


def _split(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log (p_y, 1 - p_y), (B, 2), and the log-probabilities given that the class is not y, (B, C)."""
    others = z.masked_fill(_is_target(z, labels), -torch.inf)
    rest = others.logsumexp(1)
    pair = torch.stack([z.gather(1, labels[:, None])[:, 0], rest], 1)
    # The entry of y is replaced by 0, so that no infinity meets another.
    return pair.log_softmax(1), (z - rest[:, None]).masked_fill(_is_target(z, labels), 0)


def _is_target(z: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros_like(z, dtype=torch.bool).scatter(1, labels[:, None], True)


DECOUPLED = TermEntry(
    lambda shapes, options: Decoupled(options["alpha"], options["beta"], options["temperature"]),
    "the target against all others, and the others among themselves, weighted apart",
    "Zhao et al., Decoupled Knowledge Distillation, CVPR 2022",
    options={"alpha": 1.0, "beta": 8.0, "temperature": 4.0},
)
