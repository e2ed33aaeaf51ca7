"""KDLoss in a LightningModule that logs cross-entropy and divergence.

    python -m kdfast.examples.lightning

Needs ``lightning`` (``pip install 'kdfast[examples]'``). The cached logits are a non-persistent buffer: Lightning moves
it to the module's device and omits it from checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import lightning
import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdfast
from kdfast.examples._digits import cached_logits, digits, mlp

__all__ = ["DistilledModule", "Result", "main"]


class Result(NamedTuple):
    """Metrics of the last logged step, and the share of test images classified correctly."""

    loss: float
    ce: float
    kl: float
    accuracy: float


class DistilledModule(lightning.LightningModule):
    """Student that learns from labels and from cached logits.

    Args:
        net: The student: images -> (N, C) logits.
        teacher_logits: (M, C) logits, one row per sample of the full training set.
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
    """

    teacher_logits: Tensor

    def __init__(self, net: nn.Module, teacher_logits: Tensor, alpha: float = 0.9, temperature: float = 4.0) -> None:
        super().__init__()
        self.net = net
        self.loss = kdfast.KDLoss(alpha, temperature)
        self.register_buffer("teacher_logits", teacher_logits, persistent=False)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of a batch (images, classes, indices in the training set)."""
        x, y, rows = batch
        logits = self.net(x)
        loss: Tensor = self.loss(logits, y, self.teacher_logits, rows)
        # The terms cost another pass over the logits, so they are computed only for steps that Lightning logs.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            ce, kl = kdfast.kd_loss_terms(logits, y, self.teacher_logits, rows, temperature=self.loss.temperature)
            self.log_dict({"loss": loss, "ce": ce.mean(), "kl": kl.mean()})
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log the accuracy of a batch (images, classes)."""
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW for the student."""
        return torch.optim.AdamW(self.net.parameters(), lr=5e-3)


def main(epochs: int = 3, alpha: float = 0.9, temperature: float = 4.0, precision: str = "bf16-mixed") -> Result:
    """Distill a student on the digits, and print the logged metrics.

    Args:
        epochs: Passes over the training set.
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        precision: As in ``lightning.Trainer``; kd_loss accepts logits of any autocast dtype.

    Returns:
        The metrics.
    """
    data = digits()
    lightning.seed_everything(0, verbose=False)
    module = DistilledModule(mlp(32), cached_logits(data), alpha, temperature)
    trainer = lightning.Trainer(
        max_epochs=epochs, precision=precision, accelerator="auto", devices=1, log_every_n_steps=10,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    test_loader = DataLoader(TensorDataset(data.test_x, data.test_y), batch_size=len(data.test_x))
    trainer.fit(module, DataLoader(data.indexed, batch_size=32, shuffle=True), test_loader)
    result = Result(**{name: float(trainer.callback_metrics[name]) for name in Result._fields})
    print(result)
    return result


if __name__ == "__main__":
    typer.run(main)
