"""kdfast.grad_norms on a Hugging Face vision transformer: find wrong training labels.

    python -m kdfast.examples.vit_scores
    python -m kdfast.examples.vit_scores --wrong 0.1 --epochs 20

Needs ``transformers`` (``pip install 'kdfast[examples]'``); downloads nothing: the model has random weights, and the
images are scikit-learn's digits. The program changes some labels and trains the model for a few epochs. Then it ranks
the training samples by the norm of their gradient over all parameters, which is largest for labels that contradict the
others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import typer
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

import kdfast
from kdfast.examples._digits import CLASSES, digits

__all__ = ["Result", "compute_scores", "main", "make_model"]


class Result(NamedTuple):
    """Measure how well scores find the changed labels: area under the ROC curve, and precision at their number."""

    auc: float
    precision: float


def make_model(width: int = 32, layers: int = 2) -> ViTForImageClassification:
    """Build a small vision transformer for 8 x 8 images, without dropout and with random weights."""
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def compute_scores(model: ViTForImageClassification, images: Tensor, labels: Tensor, batch_size: int = 256) -> Tensor:
    """Return the norm of each sample's gradient, (N,), computed in batches on the model's device."""
    batches = []
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        inputs = {"pixel_values": x.to(model.device)}
        norms = kdfast.grad_norms(model, inputs, y.to(model.device))
        assert isinstance(norms, Tensor)
        batches.append(norms.cpu())
    return torch.cat(batches)


def train(model: ViTForImageClassification, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train the model in place; the learning rate ends near 0, so that the last batches do not dominate the scores."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    updates = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=updates)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            logits = model(pixel_values=images[rows].to(model.device)).logits
            loss = functional.cross_entropy(logits, labels[rows].to(model.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main(epochs: int = 15, wrong: float = 0.05, samples: int = 1000, show: int = 10, device: str = "cpu") -> Result:
    """Score digits with some wrong labels, and print the samples with the highest scores.

    Args:
        epochs: Training epochs before scoring.
        wrong: Share of labels to change to another class.
        samples: Number of images to train on and to score.
        show: Number of samples to print.
        device: "cpu" or "cuda".

    Returns:
        How well the scores find the changed labels.
    """
    torch.manual_seed(0)
    data = digits(samples)
    images = data.x.view(-1, 1, 8, 8)
    changed = torch.zeros(len(images), dtype=torch.bool)
    changed[torch.randperm(len(images))[: round(wrong * len(images))]] = True
    labels = torch.where(changed, (data.y + torch.randint(1, CLASSES, data.y.shape)) % CLASSES, data.y)

    model = make_model().to(device)
    train(model, images, labels, epochs)
    scores = compute_scores(model.eval(), images, labels)

    ranked = scores.argsort(descending=True)
    print("  sample  label  true label  gradient norm")
    for i in ranked[:show].tolist():
        print(f"{i:8d}  {int(labels[i]):5d}  {int(data.y[i]):10d}  {float(scores[i]):13.2f}")
    precision = changed[ranked[: int(changed.sum())]].float().mean()
    result = Result(float(roc_auc_score(changed.numpy(), scores.numpy())), float(precision))
    print(f"{int(changed.sum())} of {len(images)} labels are wrong: {result}")
    return result


if __name__ == "__main__":
    typer.run(main)
