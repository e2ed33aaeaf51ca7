"""Interface of the terms that a student's loss may have beside cross-entropy and the divergence from the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kdfast.errors import UsageError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Outputs:
    """What a network computed for a batch; terms get it in float32, since squares and variances need the digits.

    Attributes:
        logits: (B, C).
        taps: Activations by the tap's name: (B, channels, h, w), or (B, D) for "pooled".
    """

    logits: Tensor
    taps: Mapping[str, Tensor] = field(default_factory=dict)

    def in_float32(self) -> Outputs:
        """Return the outputs in float32."""
        return Outputs(self.logits.float(), {name: tap.float() for name, tap in self.taps.items()})

    def at(self, names: tuple[str, ...]) -> list[Tensor]:
        """Return the activations of these taps."""
        return [self.taps[name] for name in names]


@dataclass(frozen=True)
class TapShapes:
    """Shapes of the taps of both networks, without the batch axis.

    Attributes:
        student: By the tap's name.
        teacher: By the tap's name.
    """

    student: Mapping[str, Shape] = field(default_factory=dict)
    teacher: Mapping[str, Shape] = field(default_factory=dict)

    def pairs(self, names: tuple[str, ...]) -> list[tuple[Shape, Shape]]:
        """Return (student's shape, teacher's shape) of each of these taps."""
        return [(self.student[name], self.teacher[name]) for name in names]

    def channels(self, name: str) -> tuple[int, int]:
        """Return the channels of a tap in the student and in the teacher."""
        return self.student[name][0], self.teacher[name][0]


@dataclass(frozen=True)
class RunSamples:
    """The samples of a run.

    Attributes:
        ids: int64 (n,), indices into the training split, ascending.
        labels: int64 (n,), their classes.
        seed: Seed of the run.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    seed: int


@dataclass(frozen=True)
class BatchSamples:
    """The samples of a batch, for a term that keeps something of each.

    Attributes:
        ids: int64 (B,), indices into the training split, on the device.
        step: int64 (), the number of steps done, on the device.
        gather: Returns the rows of a tensor (B, ...) of all processes, the same in each, with their gradients; with one
            process, the tensor.
    """

    ids: Tensor
    step: Tensor
    gather: Callable[[Tensor], Tensor] = lambda rows: rows


class Term(nn.Module):
    """A term of the loss, with its own trainable parameters, if it has any.

    `forward(student, teacher, labels)` returns a scalar. The teacher's outputs carry no gradient.
    """

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        raise NotImplementedError

    def preparation(self, teacher: Outputs) -> Tensor:
        """Return the loss that fits the term to the teacher, for a term that is prepared first."""
        raise NotImplementedError

    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Return the parameters that weight decay must leave alone."""
        return []


class SampleTerm(Term):
    """A term that keeps something of every sample of a run, such as a memory bank, in buffers."""

    def set_samples(self, samples: RunSamples) -> None:
        """Make the buffers, before the state is loaded; raise UsageError if the samples do not do."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, batch: BatchSamples | None = None) -> Tensor:
        """Return the term's value for a batch; `batch` must be given."""
        raise NotImplementedError


@dataclass(frozen=True)
class TermEntry:
    """An entry of the registry of terms.

    Attributes:
        build: Return a new term for networks with these shapes, with these values of all options; raise UsageError if
            the shapes do not fit.
        summary: One line for help.
        source: The paper.
        taps: Names of the taps that it reads; none for a term of the logits.
        options: The default of each option.
        tuned: The weight that RepDistiller's scripts tuned for it, or the paper's own.
        initial: Whether the term trains alone for the first epochs of a run, and is 0 afterwards.
        prepares: Whether it is fitted to the teacher alone in those epochs, and joins the loss after them.
        labels: Whether it depends on the labels.
        relates: Whether it relates the samples of a batch to each other, so that it is no mean over them.
        axes: Whether its taps must be (channels, height, width), or (D,) for "pooled"; else they may have any shape.
    """

    build: Callable[[TapShapes, Mapping[str, float]], Term]
    summary: str
    source: str
    taps: tuple[str, ...] = ()
    options: Mapping[str, float] = field(default_factory=dict)
    tuned: float = 1.0
    initial: bool = False
    prepares: bool = False
    labels: bool = False
    relates: bool = False
    axes: bool = True


def require_equal(shapes: TapShapes, names: tuple[str, ...], term: str, axis: slice, what: str) -> None:
    """Check that both networks agree on some axes of each tap.

    Args:
        shapes: Shapes of the taps.
        names: The taps.
        term: The term, for the message.
        axis: The axes that must agree.
        what: What the axes are, for the message.

    Raises:
        UsageError: They do not.
    """
    for name, (student, teacher) in zip(names, shapes.pairs(names), strict=True):
        if student[axis] != teacher[axis]:
            raise UsageError(
                f"the term {term} needs equal {what}, but tap {name!r} has shape {student} in the student and "
                f"{teacher} in the teacher: choose other taps, another term, or another student"
            )
