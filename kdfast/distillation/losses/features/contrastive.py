"""CRD: the student's embedding of a sample finds the teacher's among those of other classes, and the reverse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.data.stateless_random import Purpose, hash64
from kdfast.distillation.losses.base import BatchSamples, Outputs, RunSamples, SampleTerm, TapShapes, TermEntry
from kdfast.errors import DataWarning, UsageError

TAPS = ("pooled",)
OPTIONS = {"negatives": 16384.0, "temperature": 0.07, "momentum": 0.5, "dim": 128.0}
# Similarities in a tile: rows of the batch x samples of the run.
TILE = 1 << 24


class ContrastiveRepresentation(SampleTerm):
    """Noise-contrastive estimation of which sample an embedding belongs to, in both directions.

    Each network's pooled features v become a unit vector by a linear layer. The student's is compared with K + 1 rows
    of the teacher's memory bank, one row for each of the run's n samples, and the teacher's with the student's bank: a
    row m scores p = exp(v m / T) / Z, and the loss is -log(p / (p + K/n)) for the sample's own row, and the sum of
    -log((K/n) / (p + K/n)) for K rows of other classes. Z is n times the mean of exp(v m / T) over the first batch,
    for each direction. After each step a row of the batch becomes momentum * row + (1 - momentum) * v, normalized.

    The negatives are a systematic sample of the bank, which is ordered by class: each row of another class is drawn
    with the same probability and at most once, and classes in proportion to their size. They depend on the run's seed,
    the step and the sample alone. Where a class has fewer samples of other classes than K, K is their number.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_z: Tensor
    has_z: Tensor
    _ids: Tensor
    _rows: Tensor
    _starts: Tensor
    _counts: Tensor

    def __init__(self, shapes: TapShapes, options: Mapping[str, float]) -> None:
        super().__init__()
        _check_options(options)
        ((student, teacher),) = shapes.pairs(TAPS)
        self._temperature, self._momentum = options["temperature"], options["momentum"]
        self._negatives, self._dim = int(options["negatives"]), int(options["dim"])
        self.student_embedding = nn.Linear(student[0], self._dim)
        self.teacher_embedding = nn.Linear(teacher[0], self._dim)
        self._samples: RunSamples | None = None
        self._knows_z = False

    def set_samples(self, samples: RunSamples) -> None:
        """Make a memory bank for each network with a row for each sample, ordered by class.

        Warns:
            DataWarning: There are fewer negatives than asked for.

        Raises:
            UsageError: All samples are of one class.
        """
        n, labels = len(samples.ids), samples.labels
        order = np.argsort(labels, kind="stable")
        rows = np.empty(n, np.int64)
        rows[order] = np.arange(n)
        sizes = np.bincount(labels)
        fewest = n - int(sizes.max())
        if fewest == 0:
            raise UsageError(
                f"the term crd contrasts samples of different classes, and all {n} samples are of class {labels[0]}: "
                "keep samples of two classes or more"
            )
        if fewest < self._negatives:
            warnings.warn(
                f"the term crd is to draw {self._negatives} negatives for each sample, and some sample has only "
                f"{fewest} of other classes: it draws {fewest}",
                DataWarning,
                stacklevel=2,
            )
        self._negatives = min(self._negatives, fewest)
        self._samples = samples
        bound = 1 / math.sqrt(self._dim / 3)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(n, self._dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("has_z", torch.zeros((), dtype=torch.bool))
        # For the sample at each position of the run: its id, its row, and its class's first row and number of rows.
        starts = np.cumsum(sizes) - sizes
        fixed = {"_ids": samples.ids, "_rows": rows, "_starts": starts[labels], "_counts": sizes[labels]}
        for name, values in fixed.items():
            self.register_buffer(name, torch.from_numpy(values.astype(np.int64)), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, batch: BatchSamples | None = None) -> Tensor:
        """Return the term's value for a batch, and write its embeddings into the memory banks."""
        if self._samples is None or batch is None:
            raise UsageError("the term crd keeps embeddings of every sample: call set_samples, and pass `batch`")
        ours = F.normalize(self.student_embedding(student.taps[TAPS[0]]))
        theirs = F.normalize(self.teacher_embedding(teacher.taps[TAPS[0]]))
        places = torch.searchsorted(self._ids, batch.ids)
        own = self._rows[places]
        picks = torch.cat([own[:, None], self._draw_negatives(places, batch)], 1)
        pairs = ((ours, self.teacher_bank), (theirs, self.student_bank))
        self._set_constants(pairs, picks, batch)
        offsets = self.log_z + math.log(self._negatives / len(self._ids))
        value: Tensor = sum(
            (
                contrast(v, bank, picks, offset, self._temperature)
                for (v, bank), offset in zip(pairs, offsets, strict=True)
            ),
            start=ours.new_zeros(()),
        )
        self._remember(self.student_bank, own, ours, batch)
        self._remember(self.teacher_bank, own, theirs, batch)
        return value

    def _draw_negatives(self, places: Tensor, batch: BatchSamples) -> Tensor:
        """Return K rows of other classes for each sample of the batch, int64 (B, K), distinct within a row."""
        assert self._samples is not None
        starts, counts = self._starts[places, None], self._counts[places, None]
        others = len(self._ids) - counts
        words = hash_on_device(int(hash64(Purpose.NEGATIVES, self._samples.seed)[0]), batch.step, batch.ids)
        phase = ((words >> 32) & 0xFFFFFFFF).double()[:, None] * 2.0**-32
        draws = torch.arange(self._negatives, device=phase.device, dtype=torch.float64)
        drawn = ((draws + phase) * (others / self._negatives)).long()
        return torch.where(drawn < starts, drawn, drawn + counts)

    @torch.no_grad()
    def _set_constants(self, pairs: tuple[tuple[Tensor, Tensor], ...], picks: Tensor, batch: BatchSamples) -> None:
        """Set the constants Z from the first batch; a graph of a step is recorded later, without this."""
        if self._knows_z:
            return
        if not self.has_z:
            for position, (v, bank) in enumerate(pairs):
                logs = batch.gather((v @ bank.T / self._temperature).gather(1, picks).logsumexp(1))
                mean = logs.logsumexp(0) - math.log(len(logs) * picks.shape[1])
                self.log_z[position] = mean + math.log(len(bank))
            self.has_z.fill_(True)
        self._knows_z = True

    @torch.no_grad()
    def _remember(self, bank: Tensor, rows: Tensor, v: Tensor, batch: BatchSamples) -> None:
        rows, v = batch.gather(rows), batch.gather(v)
        bank[rows] = F.normalize(self._momentum * bank[rows] + (1 - self._momentum) * v.to(bank.dtype))


def contrast(v: Tensor, bank: Tensor, picks: Tensor, offset: Tensor, temperature: float) -> Tensor:
    """Return the mean over a batch of the logistic losses of its picks.

    With x = v m / T - offset for a row m of the bank, the loss is log(1 + exp(-x)) for the first pick and
    log(1 + exp(x)) for the others. The gradient is computed with the value, so the bank may change afterwards.

    Args:
        v: (B, D), the embeddings.
        bank: (n, D), without gradient.
        picks: int64 (B, K + 1), rows of the bank, distinct for each sample.
        offset: (), log Z + log(K / n).
        temperature: T.
    """
    loss: Tensor = _Contrast.apply(v, bank, picks, offset, temperature)  # type: ignore[no-untyped-call]
    return loss


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, bank: Tensor, picks: Tensor, offset: Tensor, temperature: float) -> Tensor:
        total, gradient = v.new_zeros(()), torch.empty_like(v)
        count = max(1, TILE // len(bank))
        for start in range(0, len(v), count):
            tile = slice(start, start + count)
            # All products and a choice among them: gathering K rows of the bank for each sample would move more.
            products = v[tile] @ bank.T
            x = products.gather(1, picks[tile]) / temperature - offset
            total -= F.logsigmoid(x[:, 0]).sum() + F.logsigmoid(-x[:, 1:]).sum()
            slopes = x.sigmoid()
            slopes[:, 0] -= 1
            gradient[tile] = products.zero_().scatter_(1, picks[tile], slopes) @ bank
        ctx.save_for_backward(gradient / (temperature * len(v)))
        return total / len(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None, None, None, None


def hash_on_device(state: int, *words: Tensor) -> Tensor:
    """Continue `hash64` from a state with further words, as tensors.

    Args:
        state: A word of `hash64`.
        words: int64, broadcast against each other.

    Returns:
        int64 of the broadcast shape, with the bits of the word.
    """
    x = words[0].new_full((), _signed(state))
    for word in words:
        x = (x ^ word) + _signed(0x9E3779B97F4A7C15)
        x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
        x = x ^ _shift(x, 31)
    return x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros; torch copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _check_options(options: Mapping[str, float]) -> None:
    for name, most in (("negatives", 2**31 - 1), ("dim", 2**16)):
        if not 1 <= options[name] <= most or options[name] != int(options[name]):
            raise UsageError(f"the term crd has {name} {options[name]:g}: pass an integer from 1 to {most}")
    if options["temperature"] <= 0:
        raise UsageError(f"the term crd has temperature {options['temperature']:g}: pass a number above 0")
    if not 0 <= options["momentum"] < 1:
        raise UsageError(f"the term crd has momentum {options['momentum']:g}: pass a number in [0, 1)")


CONTRASTIVE = TermEntry(
    ContrastiveRepresentation,
    "pooled features of a sample told apart from those of other classes, kept in memory banks",
    "Tian et al., Contrastive Representation Distillation, ICLR 2020, section 3",
    TAPS,
    OPTIONS,
    tuned=0.8,
    labels=True,
)
