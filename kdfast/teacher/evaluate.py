"""Evaluate a model on a split: accuracy, per class too, loss, calibration, and agreement with another model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.data.source import Split
from kdfast.data.views import ViewSpec, apply_views
from kdfast.errors import CheckpointError
from kdfast.nets.checkpoint import Model
from kdfast.ops.float32 import full_float32
from kdfast.teacher.predictor import default_batch_size

ECE_BINS = 15
"""Bins of equal width over the confidences 0 to 1."""


def evaluate(
    model: Model,
    split: Split,
    *,
    device: torch.device | str = "cpu",
    view_spec: ViewSpec | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Compute accuracy and loss of a model on the unaugmented images of a split.

    Args:
        model: The model. Its network moves to the device and keeps its mode (train or eval).
        split: Images and labels.
        device: Where to compute.
        view_spec: The data's set of views, whose identity is evaluated; None for the images as they are.
        batch_size: Images per forward pass; None for one that suits the device.

    Returns:
        "top1" and "top5" in percent (with fewer than 5 classes, top 5 is top C), and "loss", the mean cross-entropy in
        nats.

    Raises:
        CheckpointError: The split has a label outside the model's classes.
    """
    found = evaluate_in_detail(model, split, device=device, view_spec=view_spec, batch_size=batch_size)
    return {name: found[name] for name in ("top1", "top5", "loss")}


def evaluate_in_detail(
    model: Model,
    split: Split,
    *,
    teacher: Model | None = None,
    device: torch.device | str = "cpu",
    view_spec: ViewSpec | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model as `evaluate` does, with what its predictions look like.

    Source of the calibration error: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        model: The model. Its network moves to the device and keeps its mode (train or eval).
        split: Images and labels.
        teacher: A model of the same classes to compare the predictions with; or None.
        device: Where to compute.
        view_spec: The data's set of views, whose identity is evaluated; None for the images as they are.
        batch_size: Images per forward pass; None for one that suits the device.

    Returns:
        The values of `evaluate`, and "per_class", the top-1 accuracy of each class in percent, None for a class without
        images; "calibration" with "ece", the expected calibration error in percentage points, "bins", the number of
        its bins of equal width, and "confidence", the mean of the highest probability in percent; and with a teacher
        "agreement", the share of images in percent for which both models predict the same class.

    Raises:
        CheckpointError: The split has a label outside the model's classes, or the teacher has another number of them.
    """
    place = torch.device(device)
    if int(split.labels.max()) >= model.classes:
        raise CheckpointError(
            f"the data has the label {int(split.labels.max())}, but {model.name} has {model.classes} classes: "
            "use a model trained on this data"
        )
    if teacher is not None and teacher.classes != model.classes:
        raise CheckpointError(
            f"the teacher has {teacher.classes} classes, but {model.name} has {model.classes}: pass its own teacher"
        )
    spec = view_spec or ViewSpec(kind="shift", size=split.shape[:2])
    size = batch_size or default_batch_size(place)
    sums = _Sums(model.classes, place)
    networks = [model] if teacher is None else [model, teacher]
    modes = [one.net.training for one in networks]
    for one in networks:
        one.net.to(place).eval()
    try:
        _predict(networks, split, spec, place, size, sums)
    finally:
        for one, mode in zip(networks, modes, strict=True):
            one.net.train(mode)
    return sums.result(with_agreement=teacher is not None)


@torch.inference_mode()
@full_float32()
def _predict(
    models: list[Model], split: Split, spec: ViewSpec, device: torch.device, batch_size: int, sums: _Sums
) -> None:
    for start in range(0, len(split), batch_size):
        ids = np.arange(start, min(start + batch_size, len(split)), dtype=np.int64)
        images = torch.from_numpy(split.read(ids)).to(device)
        labels = torch.from_numpy(split.labels[ids]).to(device)
        views = torch.full((len(ids),), spec.identity)
        outputs = [
            model.net(apply_views(images, views, spec, model.normalization, sample_ids=ids)).float() for model in models
        ]
        sums.add(outputs[0], labels, outputs[-1])


class _Sums:
    """Sums over the images of a split, on the device: reading one waits for the batch.

    Args:
        classes: Number of classes.
        device: Device of the logits.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._top5 = torch.zeros((), dtype=torch.int64, device=device)
        self._agreeing = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        # One row for the images, one for those that are classified correctly.
        self._by_class = torch.zeros(2, classes, dtype=torch.int64, device=device)
        # Rows: images, correct ones, sum of the confidences.
        self._by_bin = torch.zeros(3, ECE_BINS, dtype=torch.float64, device=device)
        self._edges = torch.linspace(0, 1, ECE_BINS + 1, dtype=torch.float64, device=device)[1:-1]

    def add(self, logits: Tensor, labels: Tensor, others: Tensor) -> None:
        """Add a batch: logits (B, C), labels (B,), and the logits (B, C) of the model to compare with."""
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        right = hits[:, 0]
        self._top5 += hits.sum()
        self._loss += F.cross_entropy(logits, labels, reduction="sum")
        self._agreeing += (logits.argmax(1) == others.argmax(1)).sum()
        self._by_class[0].index_add_(0, labels, torch.ones_like(labels))
        self._by_class[1].index_add_(0, labels, right.long())
        confidences = logits.double().softmax(1).amax(1)
        # A bin includes its upper edge, as in the paper.
        bins = torch.bucketize(confidences, self._edges)
        values = torch.stack([torch.ones_like(confidences), right.double(), confidences])
        self._by_bin.index_add_(1, bins, values)

    def result(self, *, with_agreement: bool) -> dict[str, Any]:
        """Return the values of `evaluate_in_detail`."""
        images, right = self._by_class.tolist()
        count = sum(images)
        _, correct, confidence = self._by_bin
        ece = float((correct - confidence).abs().sum()) / count
        found: dict[str, Any] = {
            "top1": 100 * sum(right) / count,
            "top5": 100 * int(self._top5) / count,
            "loss": float(self._loss) / count,
            "per_class": [100 * hit / n if n else None for hit, n in zip(right, images, strict=True)],
            "calibration": {
                "ece": 100 * ece,
                "bins": ECE_BINS,
                # Rounding may exceed 1 if all probabilities are 1.
                "confidence": min(100.0, 100 * float(confidence.sum()) / count),
            },
        }
        if with_agreement:
            found["agreement"] = 100 * int(self._agreeing) / count
        return found
