"""Accuracy and loss of a model on a split."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from kdfast.data.source import Split
from kdfast.data.views import ViewSpec, apply_views
from kdfast.errors import CheckpointError
from kdfast.nets.checkpoint import Model
from kdfast.teacher.forward import default_batch


def evaluate(
    model: Model,
    split: Split,
    *,
    device: torch.device | str = "cpu",
    views: ViewSpec | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Score a model on the unaugmented images of a split.

    Args:
        model: The model; its network is moved to the device, and is left in the mode (train or eval) it was in.
        split: Images and labels.
        device: Where to compute.
        views: The views of the data, whose identity is shown; the images as they are when not given.
        batch_size: Images per forward pass; one that suits the device when not given.

    Returns:
        "top1" and "top5" in percent (top 5 of fewer classes is top C), and "loss", the mean cross entropy in nats.

    Raises:
        CheckpointError: The split has labels that the model does not know.
    """
    place = torch.device(device)
    spec = views or ViewSpec(kind="shift", size=split.shape[:2])
    if int(split.labels.max()) >= model.classes:
        raise CheckpointError(
            f"the data has the label {int(split.labels.max())}, but {model.name} knows {model.classes} classes: "
            "give a model trained on this data"
        )
    net = model.net.to(place)
    training = net.training
    net.eval()
    try:
        return _score(model, net, split, spec, place, batch_size or default_batch(place))
    finally:
        net.train(training)


@torch.inference_mode()
def _score(
    model: Model, net: torch.nn.Module, split: Split, spec: ViewSpec, device: torch.device, batch_size: int
) -> dict[str, float]:
    top1 = top5 = 0
    loss = 0.0
    for start in range(0, len(split), batch_size):
        ids = np.arange(start, min(start + batch_size, len(split)), dtype=np.int64)
        images = torch.from_numpy(split.read(ids)).to(device)
        labels = torch.from_numpy(split.labels[ids]).to(device)
        views = torch.full((len(ids),), spec.identity)
        logits = net(apply_views(images, views, spec, model.normalization, sample_ids=ids)).float()
        hits = logits.topk(min(5, model.classes)).indices == labels[:, None]
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"top1": 100 * top1 / len(split), "top5": 100 * top5 / len(split), "loss": loss / len(split)}
