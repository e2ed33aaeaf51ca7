"""Evaluate a model on a split: accuracy and loss."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from kdfast.data.source import Split
from kdfast.data.views import ViewSpec, apply_views
from kdfast.errors import CheckpointError
from kdfast.nets.checkpoint import Model
from kdfast.ops.float32 import full_float32
from kdfast.teacher.predictor import default_batch_size


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
    place = torch.device(device)
    spec = view_spec or ViewSpec(kind="shift", size=split.shape[:2])
    if int(split.labels.max()) >= model.classes:
        raise CheckpointError(
            f"the data has the label {int(split.labels.max())}, but {model.name} has {model.classes} classes: "
            "use a model trained on this data"
        )
    net = model.net.to(place)
    training = net.training
    net.eval()
    try:
        return _evaluate(model, net, split, spec, place, batch_size or default_batch_size(place))
    finally:
        net.train(training)


@torch.inference_mode()
@full_float32()
def _evaluate(
    model: Model, net: torch.nn.Module, split: Split, spec: ViewSpec, device: torch.device, batch_size: int
) -> dict[str, float]:
    # On the device: reading a sum waits for the batch.
    top1, top5 = torch.zeros(2, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(split), batch_size):
        ids = np.arange(start, min(start + batch_size, len(split)), dtype=np.int64)
        images = torch.from_numpy(split.read(ids)).to(device)
        labels = torch.from_numpy(split.labels[ids]).to(device)
        views = torch.full((len(ids),), spec.identity)
        logits = net(apply_views(images, views, spec, model.normalization, sample_ids=ids)).float()
        hits = logits.topk(min(5, model.classes)).indices == labels[:, None]
        top1 += hits[:, 0].sum()
        top5 += hits.sum()
        loss += F.cross_entropy(logits, labels, reduction="sum")
    count = len(split)
    return {"top1": 100 * int(top1) / count, "top5": 100 * int(top5) / count, "loss": float(loss) / count}
