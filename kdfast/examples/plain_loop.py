"""kd_loss in a plain PyTorch loop: a subset of the data, cached teacher logits, mixed precision.

    python -m kdfast.examples.plain_loop
    python -m kdfast.examples.plain_loop --device cuda --amp fp16 --compile-model

The teacher runs once and stores its logits in a float16 table with one row per sample of the full training set. The
student trains on a tenth of that set. Its loader yields image, class and the sample's index in the full set, which is
the sample's row in the table: ``kd_loss`` reads the row there, so no teacher logits are copied into batches.
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
    """Mean losses of the first and the last epoch, and the share of test images classified correctly."""

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
    """Distill a student on a subset of the digits, and print its accuracy.

    Args:
        epochs: Passes over the kept samples.
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.
        keep: Share of the training samples to keep.
        amp: Autocast dtype: "none", "bf16" or "fp16".
        device: "cpu" or "cuda".
        compile_model: Whether to compile the student by ``torch.compile``, which supports ``kd_loss``, too.

    Returns:
        Losses and accuracy.
    """
    if amp not in AMP or not 0 < keep <= 1:
        raise typer.BadParameter(f"--amp must be one of {', '.join(AMP)}, and --keep lie in (0, 1]")
    data = digits()
    teacher_logits = cached_logits(data).to(device)
    kept = (torch.arange(max(1, round(keep * len(data.x)))) / keep).long()  # or idx.npy of `kdfast prune`
    loader = DataLoader(Subset(data.indexed, kept.tolist()), batch_size=32, shuffle=True)

    student = mlp(32).to(device)
    forward = torch.compile(student) if compile_model else student
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    # float16 gradients need loss scaling; the scaler is disabled for other dtypes.
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
