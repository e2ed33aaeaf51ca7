"""KDLoss as the criterion of timm's training loop, with its models, optimizers, schedules and loss scaler.

    python -m kdfast.examples.timm_loop

Needs ``timm`` and the ``torchvision`` for the installed torch. Two changes to timm's loop suffice: the loader also
yields each sample's index, and the criterion receives the teacher logits and that index. Disable mixup and cutmix: the
cached logits do not cover mixed images.
"""

from __future__ import annotations

from typing import NamedTuple

import timm
import torch
import typer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, NativeScaler
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import kdfast
from kdfast.examples._digits import CLASSES, accuracy, cached_logits, digits

__all__ = ["Result", "main"]


class Result(NamedTuple):
    """Mean loss and learning rate of each epoch, and the share of training images classified correctly."""

    losses: list[float]
    rates: list[float]
    accuracy: float


def as_images(x: Tensor) -> Tensor:
    """Convert digits (N, 64) to images (N, 3, 32, 32)."""
    images = x.reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    return torch.nn.functional.interpolate(images, size=32)


def main(epochs: int = 4, samples: int = 256, model_name: str = "test_resnet", alpha: float = 0.9) -> Result:
    """Distill one of timm's networks on a subset of the digits.

    Args:
        epochs: Passes over the kept samples.
        samples: Number of training samples to keep.
        model_name: A name from ``timm.list_models()``.
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.

    Returns:
        Losses, learning rates and accuracy.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = digits()
    teacher_logits = cached_logits(data).to(device)
    torch.manual_seed(0)
    loader = DataLoader(Subset(data.indexed, range(samples)), batch_size=32, shuffle=True, drop_last=True)

    model = timm.create_model(model_name, num_classes=CLASSES).to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-4, step_on_epochs=False,
        updates_per_epoch=len(loader),
    )  # fmt: skip
    scaler = NativeScaler(device=device.type)
    criterion = kdfast.KDLoss(alpha=alpha, temperature=4.0)

    losses, rates, updates = [], [], 0
    for epoch in range(epochs):
        model.train()
        meter = AverageMeter()
        for x, y, rows in loader:
            x, y, rows = as_images(x).to(device), y.to(device), rows.to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = criterion(model(x), y, teacher_logits, rows)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=5.0, parameters=model.parameters())
            updates += 1
            scheduler.step_update(num_updates=updates)
            meter.update(loss.item(), len(x))
        scheduler.step(epoch + 1)
        losses.append(meter.avg)
        rates.append(optimizer.param_groups[0]["lr"])
        print(f"epoch {epoch}: loss {losses[-1]:.3f}, learning rate {rates[-1]:.2e}")

    model.eval()
    result = Result(losses, rates, accuracy(model, as_images(data.x[:samples]).to(device), data.y[:samples].to(device)))
    print(result)
    return result


if __name__ == "__main__":
    typer.run(main)
