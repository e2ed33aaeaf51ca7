"""kd_loss as a training task of timm: its distillation task, with cached logits in place of a teacher.

    python -m kdfast.examples.timm_task

Needs a ``timm`` with ``timm.task`` and the ``torchvision`` for the installed torch. A task computes the loss of a
batch, wraps the student for several processes, and averages its weights. The target holds each sample's label and
index, so that timm's loaders move both. Disable mixup and cutmix: the cached logits do not cover mixed images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
import typer
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import kdfast
from kdfast.examples._digits import CLASSES, accuracy, cached_logits, digits
from kdfast.examples.timm_loop import as_images

__all__ = ["CachedDistillationTask", "Result", "main"]


class Result(NamedTuple):
    """Mean loss of each epoch, and the share of training images classified correctly."""

    losses: list[float]
    accuracy: float


class CachedDistillationTask(TrainingTask):
    """Task whose loss is ``kdfast.kd_loss`` with cached logits.

    Args:
        student_model: The student.
        teacher_logits: (M, C), one row per sample of the whole data set.
        alpha: As in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        **task: As in ``timm.task.TrainingTask``.
    """

    def __init__(
        self, student_model: nn.Module, teacher_logits: Tensor, alpha: float, temperature: float, **task: Any
    ) -> None:
        super().__init__(**task)
        self.trainable_module = student_model
        self.criterion = kdfast.KDLoss(alpha=alpha, temperature=temperature)
        self.register_buffer("teacher_logits", teacher_logits.to(self.device), persistent=False)

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp: Any) -> CachedDistillationTask:
        """Wrap the student in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **options: Any) -> nn.Module:
        """Compile the student."""
        self.trainable_module.compile(backend=backend, mode=mode, **options)
        return self.trainable_module

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return "loss" and "output", the logits, of images and a target (N, 2): label and index of each sample."""
        labels, rows = target.unbind(1)
        output = self.trainable_module(input)
        return {"loss": self.criterion(output, labels, self.teacher_logits, rows), "output": output}


def main(epochs: int = 4, samples: int = 256, model_name: str = "test_resnet", alpha: float = 0.9) -> Result:
    """Distill one of timm's networks on a subset of the digits.

    Args:
        epochs: Passes over the kept samples.
        samples: Number of training samples to keep.
        model_name: A name from ``timm.list_models()``.
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.

    Returns:
        Losses and accuracy.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = digits()
    targets = torch.stack([data.y, torch.arange(len(data.y))], 1)
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(data.x[:samples], targets[:samples]), batch_size=32, shuffle=True)
    student = timm.create_model(model_name, num_classes=CLASSES).to(device)
    task = CachedDistillationTask(student, cached_logits(data), alpha, temperature=4.0, device=device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=2e-3, weight_decay=0.05)
    losses = []
    for _ in range(epochs):
        task.train()
        total = 0.0
        for x, target in loader:
            optimizer.zero_grad()
            loss = task(as_images(x).to(device), target.to(device))["loss"]
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        losses.append(total / samples)
    task.eval()
    images = as_images(data.x[:samples]).to(device)
    result = Result(losses, accuracy(task.get_eval_model(), images, data.y[:samples].to(device)))
    print(result)
    return result


if __name__ == "__main__":
    typer.run(main)
