"""Factor transfer: the student's last activations match an encoding of the teacher's, learned by an auto-encoder."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.distillation.losses.base import Outputs, TapShapes, Term, TermEntry
from kdfast.distillation.losses.features.maps import attention_map, match_sizes

TAPS = ("stage3",)
SLOPE = 0.1


class FactorTransfer(Term):
    """Mean absolute difference of the attention maps of the translated student and of the teacher's code.

    The paraphraser, an auto-encoder of the teacher's activations with half as many channels in its code, is fitted
    first (`preparation`); then the translator and the student train with the paraphraser fixed.
    """

    def __init__(self, shapes: TapShapes) -> None:
        super().__init__()
        ((student, teacher),) = shapes.pairs(TAPS)
        code = max(1, teacher[0] // 2)
        self.encoder = _convolutions(teacher[0], teacher[0], code, code)
        self.decoder = _convolutions(code, code, teacher[0], teacher[0])
        self.translator = _convolutions(student[0], student[0], code, code)

    def preparation(self, teacher: Outputs) -> Tensor:
        """Return the paraphraser's mean squared error on the teacher's activations."""
        self.encoder.train()
        self.decoder.train()
        activations = teacher.taps[TAPS[0]]
        return F.mse_loss(self.decoder(self.encoder(activations)), activations)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        code = self.encoder.eval()(teacher.taps[TAPS[0]]).detach()
        ours, theirs = match_sizes(self.translator(student.taps[TAPS[0]]), code)
        return (attention_map(ours) - attention_map(theirs)).abs().mean()


def _convolutions(*channels: int) -> nn.Sequential:
    """Return 3x3 convolutions with batch norm and leaky ReLU between these numbers of channels."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


FACTOR_TRANSFER = TermEntry(
    lambda shapes, options: FactorTransfer(shapes),
    "an auto-encoder's code of the teacher's last stage",
    "Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018, equation 3",
    TAPS,
    tuned=200,
    prepares=True,
)
