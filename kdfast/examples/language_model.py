"""Distill a small language model from stored log-probabilities, and on half of the texts.

    python -m kdfast.examples.language_model
    python -m kdfast.examples.language_model --steps 300 --teacher-steps 600 --texts 0

A byte-wise transformer learns from a larger one, on sonnets. The same student is trained with the teacher's logits,
with its k largest log-probabilities in a cache (``kdfast.TokenWriter``), and with its hidden states and last layer,
which need no logits at all (``kdfast.linear_kd_loss``): the losses are the same. Then it is trained on half of the
texts, chosen by the teacher's cross-entropy and by influence on some others, and at random.

The second command takes about a minute of one core; it uses all texts, of which every eighth is held out, and another
eighth chooses by influence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import kdfast
from kdfast.examples._causal_lm import VOCABULARY, CausalLM, load_texts

__all__ = ["Distillation", "Result", "choose_half", "main", "store", "train_teacher"]

ALPHA = 0.9
BATCH = 16
EVALUATIONS = 10

Loss = Callable[[CausalLM, Tensor], Tensor]
"""The loss of a student on texts, given by their numbers (B,)."""


class Result(NamedTuple):
    """Loss of the student on held-out texts against the teacher's logits, during training, for each kind of teacher.

    Attributes:
        dense: With the teacher's logits.
        top_k: With the cache of its k largest log-probabilities.
        hidden: With its hidden states and last layer.
        random_half: On half of the texts, drawn at random.
        hard_half: On the half with the largest cross-entropy of the teacher.
        easy_half: On the half with the smallest.
        influence_half: On the half that lowers the loss of other texts most, by the influence of the teacher's head.
    """

    dense: list[float]
    top_k: list[float]
    hidden: list[float]
    random_half: list[float]
    hard_half: list[float]
    easy_half: list[float]
    influence_half: list[float]


def train_teacher(texts: Tensor, steps: int, width: int = 64, layers: int = 2) -> CausalLM:
    """Train a transformer on texts (S, L + 1)."""
    torch.manual_seed(0)
    teacher = CausalLM(width, layers, texts.shape[1] - 1)
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = texts[torch.randint(len(texts), (BATCH,), generator=generator)]
        loss = F.cross_entropy(teacher(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return teacher.eval()


@torch.no_grad()
def store(teacher: CausalLM, texts: Tensor, folder: Path, k: int) -> kdfast.TokenTeacher:
    """Write the k largest log-probabilities of each byte to a cache, text by text."""
    with kdfast.TokenWriter(folder, VOCABULARY) as writer:
        for text in texts[writer.done :]:
            values, ids = teacher(text[None, :-1])[0].log_softmax(-1).topk(k)
            writer.add(values, ids, labels=text[1:])
    return kdfast.TokenTeacher.open(folder)


class Distillation:
    """Trains students of a teacher on texts, all from the same start.

    Args:
        teacher: The teacher.
        texts: (S, L + 1) bytes of the training texts.
        chooser: (U, L + 1) bytes of texts for which the influence of the training texts is computed.
        held_out: (U, L + 1) bytes of the texts on which students are evaluated.
        steps: Updates of a student.
    """

    def __init__(self, teacher: CausalLM, texts: Tensor, chooser: Tensor, held_out: Tensor, steps: int) -> None:
        self.teacher, self.texts, self.chooser, self.held_out, self.steps = teacher, texts, chooser, held_out, steps
        with torch.no_grad():
            self.hidden = teacher.hidden(texts[:, :-1])  # (S, L, width)
            self.logits = teacher.head(self.hidden)  # (S, L, V)
            self.held_out_logits = teacher(held_out[:, :-1])

    def run(self, loss: Loss, kept: np.ndarray | None = None) -> list[float]:
        """Train a student, and return its loss on the held-out texts ten times, evenly spaced."""
        torch.manual_seed(2)
        student = CausalLM(32, 1, self.texts.shape[1] - 1)
        optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        numbers = torch.arange(len(self.texts)) if kept is None else torch.from_numpy(kept)
        generator = torch.Generator().manual_seed(3)
        curve = []
        for step in range(1, self.steps + 1):
            batch = numbers[torch.randint(len(numbers), (BATCH,), generator=generator)]
            optimizer.zero_grad()
            loss(student, batch).backward()
            optimizer.step()
            schedule.step()
            if step % max(1, self.steps // EVALUATIONS) == 0:
                curve.append(self.evaluate(student))
        return curve

    @torch.no_grad()
    def evaluate(self, student: CausalLM) -> float:
        """Return the loss on the held-out texts against the teacher's logits."""
        logits, labels = student(self.held_out[:, :-1]).flatten(0, 1), self.held_out[:, 1:].flatten()
        return float(kdfast.kd_loss(logits, labels, self.held_out_logits.flatten(0, 1), alpha=ALPHA, temperature=1.0))

    def dense(self, student: CausalLM, numbers: Tensor) -> Tensor:
        """Compute the loss against the teacher's logits."""
        text = self.texts[numbers]
        logits, teacher = student(text[:, :-1]).flatten(0, 1), self.logits[numbers].flatten(0, 1)
        return kdfast.kd_loss(logits, text[:, 1:].flatten(), teacher, alpha=ALPHA, temperature=1.0)

    def from_cache(self, cache: kdfast.TokenTeacher) -> Loss:
        """Return the loss against a cache."""

        def loss(student: CausalLM, numbers: Tensor) -> Tensor:
            batch = cache.lookup(numbers)
            logits = student(self.texts[numbers][:, :-1]).flatten(0, 1)
            labels, rows = batch.labels.flatten(), batch.rows.flatten()
            return kdfast.kd_loss(logits, labels, batch.teacher, rows, alpha=ALPHA, temperature=1.0)

        return loss

    def from_hidden(self, student: CausalLM, numbers: Tensor) -> Tensor:
        """Compute the loss against the teacher's hidden states and last layer; no logits of all tokens are held."""
        text = self.texts[numbers]
        return kdfast.linear_kd_loss(
            student.hidden(text[:, :-1]).flatten(0, 1), student.head.weight, text[:, 1:].flatten(),
            (self.hidden[numbers].flatten(0, 1), self.teacher.head.weight.detach()), alpha=ALPHA, temperature=1.0,
        )  # fmt: skip


def choose_half(work: Distillation, cache: kdfast.TokenTeacher) -> dict[str, np.ndarray]:
    """Return half of the texts, by the teacher's cross-entropy, by influence of its head, and at random."""
    texts, length = work.texts[:, 1:].shape
    one_class = np.zeros(texts, np.int64)  # texts have no classes to balance
    difficulty = kdfast.token_scores(cache, "ce").texts()
    with torch.no_grad():
        others = work.teacher.hidden(work.chooser[:, :-1]).flatten(0, 1)
        logits = work.teacher.head(others)
    influence = kdfast.head_influence(
        work.hidden.flatten(0, 1), work.logits.flatten(0, 1), work.texts[:, 1:].flatten(),
        others, logits, work.chooser[:, 1:].flatten(), l2=1e-2, bias=False,
    )  # fmt: skip
    helpful = influence.view(texts, length).sum(1).numpy()
    return {
        "random_half": kdfast.prune(one_class, 0.5),
        "hard_half": kdfast.prune(one_class, 0.5, scores=difficulty, rule="hard"),
        "easy_half": kdfast.prune(one_class, 0.5, scores=difficulty, rule="easy"),
        "influence_half": kdfast.prune(one_class, 0.5, scores=helpful, rule="hard"),
    }


def main(steps: int = 20, teacher_steps: int = 40, k: int = 64, texts: int = 64) -> Result:
    """Train the students, and print their losses on held-out texts during training.

    Args:
        steps: Updates of each student, each with 16 texts of 64 bytes.
        teacher_steps: Updates of the teacher.
        k: Log-probabilities stored for each byte.
        texts: Texts to use; 0 for all, about 300.

    Returns:
        The losses.
    """
    every = load_texts(count=texts or None)
    part = torch.arange(len(every)) % 8
    work_texts = every[part < 6]
    work = Distillation(train_teacher(work_texts, teacher_steps), work_texts, every[part == 6], every[part == 7], steps)
    with tempfile.TemporaryDirectory() as folder:
        cache = store(work.teacher, work_texts, Path(folder) / "tokens", k)
        curves = {
            "dense": work.run(work.dense),
            "top_k": work.run(work.from_cache(cache)),
            "hidden": work.run(work.from_hidden),
        }
        for name, kept in choose_half(work, cache).items():
            curves[name] = work.run(work.from_cache(cache), kept)
    result = Result(**curves)
    for name, curve in curves.items():
        print(f"{name:>15}: {' '.join(f'{loss:.4f}' for loss in curve)}")
    print(f"Result(dense={result.dense[-1]:.4f}, top_k={result.top_k[-1]:.4f}, hidden={result.hidden[-1]:.4f})")
    return result


if __name__ == "__main__":
    typer.run(main)
