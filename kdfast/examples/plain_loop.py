"""kd_loss in a plain PyTorch loop: part of the data, a cached teacher, mixed precision.

    python -m kdfast.examples.plain_loop
    python -m kdfast.examples.plain_loop --device cuda --amp fp16 --compile-model

The teacher ran once: its logits lie in one float16 table, a row for each sample of the whole training set. The student
trains on a tenth of that set. Its loader hands out, beside image and class, the sample's index in the whole set, and
that index is the teacher's row: nothing is gathered, and no second data set is kept in step with the first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import typer
from torch.utils.data import DataLoader, Subset

import kdfast
from kdfast.examples._digits import accuracy, cached_logits, digits, mlp

__all__ = ["Result", "main"]

AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Result(NamedTuple):
    """Mean loss of the first and of the last epoch, and the share of test images that are classified correctly."""

    first_loss: float
    last_loss: float
    accuracy: float


def main(
    epochs: int = 30,
    alpha: float = 0.9,
    keep: float = 0.1,
    amp: str = "bf16",
    device: str = "cpu",
    compile_model: bool = False,
) -> Result:
    """Distill a student on part of the digits, and print how well it does.

    Args:
        epochs: Passes over the kept samples.
        alpha: Weight of the teacher against the labels, as in ``kdfast.kd_loss``.
        keep: Share of the training samples to keep.
        amp: "none", "bf16" or "fp16": what autocast computes in.
        device: "cpu" or "cuda".
        compile_model: Whether the student goes through ``torch.compile``; the loss may also be compiled with it.

    Returns:
        Losses and accuracy.
    """
    if amp not in AMP or not 0 < keep <= 1:
        raise typer.BadParameter(f"--amp must be one of {', '.join(AMP)}, and --keep lie in (0, 1]")
    data = digits()
    teacher_logits = cached_logits(data).to(device)
    kept = (torch.arange(max(1, round(keep * len(data.x)))) / keep).long()  # `kdfast prune` writes such to idx.npy
    loader = DataLoader(Subset(data.indexed, kept.tolist()), batch_size=32, shuffle=True)

    student = mlp(32).to(device)
    forward = torch.compile(student) if compile_model else student
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    # float16 gradients need a scaled loss; for the other types the scaler does nothing.
    scaler = torch.amp.GradScaler(device, enabled=amp == "fp16")
    losses = []
    for _ in range(epochs):
        total = torch.zeros((), device=device)
        for x, y, rows in loader:
            x, y, rows = x.to(device), y.to(device), rows.to(device)
            with torch.autocast(device, AMP[amp], enabled=amp != "none"):
                logits = forward(x)
                loss = kdfast.kd_loss(logits, y, teacher_logits, rows, alpha=alpha, temperature=4.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach() * len(x)
        losses.append(float(total) / len(kept))

    result = Result(losses[0], losses[-1], accuracy(student, data.test_x.to(device), data.test_y.to(device)))
    print(f"{len(kept)} of {len(data.x)} samples: {result}")
    return result


if __name__ == "__main__":
    typer.run(main)
