"""Estimates before long work: the time it takes, from a timed part of it, and the space that it needs."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from kdfast.data.source import Source, Split
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.nets.head import forward_with_features
from kdfast.teacher.predictor import Predictor, default_batch_size

_FEW = 20  # batches; less work is done sooner than estimated


def estimate_forward(source: Source, model: Model, device: torch.device, images: int) -> float | None:
    """Return the seconds that a model takes for a number of images, or None if they are few.

    Args:
        source: The data, of which one batch is read and run.
        model: The model.
        device: Where to compute.
        images: The number of images.
    """
    size = min(default_batch_size(device), len(source.train))
    if images < _FEW * size:
        return None
    ids = np.arange(size, dtype=np.int64)
    batch = torch.from_numpy(source.train.read(ids)).to(device)
    predictor = Predictor(model, source.view_spec, device, size)
    return _timed(lambda: predictor.predict_identity(batch, ids), device) * images / size


def estimate_training(
    net: str, source: Source, device: torch.device, *, steps: int, batch_size: int, forwards: int
) -> float | None:
    """Return the seconds that training takes in float32, or None if it has few steps.

    Args:
        net: Name of the network.
        source: The data.
        device: Where to compute.
        steps: Steps of training.
        batch_size: Images of a step.
        forwards: Images that are only classified besides.
    """
    if steps < _FEW:
        return None
    with torch.random.fork_rng(devices=[]):
        network = build_net(net, len(source.classes)).to(device).train()
    images = torch.rand(batch_size, 3, *source.view_spec.size, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def step() -> None:
        F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]

    def classify() -> None:
        with torch.no_grad():
            network(images)

    return _timed(step, device) * steps + _timed(classify, device) * forwards / batch_size


def cached_bytes(model: Model, source: Source, *, samples: int, view_bytes: int) -> int:
    """Return the bytes of a cache.

    Args:
        model: The teacher.
        source: The data.
        samples: Number of cached samples.
        view_bytes: Bytes of the logits of a sample's views.
    """
    with torch.no_grad():
        logits, features = forward_with_features(model.net, torch.zeros(1, 3, *source.view_spec.size))
    # Of the image as it is, logits and features are also stored in float32.
    return samples * (view_bytes + 4 * (logits.shape[1] + features.shape[1]))


def recorded_bytes(net: str, source: Source, *, bits: int, feature_epochs: int) -> int:
    """Return the bytes of recorded dynamics.

    Args:
        net: Name of the network.
        source: The data.
        bits: Bits of a sample without features, over all epochs and runs.
        feature_epochs: Number of times that features are kept, over all runs.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        network = build_net(net, len(source.classes)).eval()
        _, features = forward_with_features(network, torch.zeros(1, 3, *source.view_spec.size))
    return len(source.train) * (bits // 8 + 4 * features.shape[1] * feature_epochs)


def estimate_reading(split: Split) -> float | None:
    """Return the seconds that reading a split twice takes, or None if it is small."""
    count = 256
    if len(split) < _FEW * count:
        return None
    started = time.perf_counter()
    split.read(np.arange(count, dtype=np.int64))
    return 2 * (time.perf_counter() - started) * len(split) / count


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the second of two calls; the first one also prepares."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
