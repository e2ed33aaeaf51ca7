"""Estimates before long work: the time it takes, from a timed part of it, and the space that it needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kdfast.data.source import Source, Split
from kdfast.data.stateless_random import IntArray
from kdfast.device import autocast
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.nets.head import forward_with_features
from kdfast.teacher.manifest import CLASSIFIER, COVERAGE, FEATURES, IDENTITY, SHARDS
from kdfast.teacher.predictor import Precision, Predictor, default_batch_size
from kdfast.teacher.row_format import RowFormat
from kdfast.teacher.writing.shards import ShardBuilder

_FEW = 20  # batches; less work is done sooner than estimated


def estimate_cache(
    source: Source,
    model: Model,
    device: torch.device,
    *,
    ids: IntArray,
    n_views: int,
    rows: RowFormat,
    precision: Precision,
    batch_size: int | None,
) -> float | None:
    """Return the seconds that a cache takes, with the test split, or None if both have few images.

    Two batches are read, augmented, run and packed, as all of them will be.

    Args:
        source: The data.
        model: The teacher.
        device: Where to compute.
        ids: int64 (n,), the samples, ascending.
        n_views: Views of each.
        rows: Format of the stored rows.
        precision: Arithmetic of the teacher.
        batch_size: Images of a batch; None for one that suits the device.
    """
    size = batch_size or default_batch_size(device)
    samples = -(-2 * size // n_views)
    images = len(ids) * n_views + len(source.test)
    if images < _FEW * samples * n_views:
        return None
    builder = row_builder(source, Predictor(model, source.view_spec, device, size), n_views, rows, precision)
    # Spread over the data, whose first images may be in memory already.
    chosen = ids[np.linspace(0, len(ids) - 1, samples + 1).astype(np.int64)]
    builder.compute(chosen[:1], lambda images: None)  # the first call also prepares
    started = time.perf_counter()
    builder.compute(chosen[1:], lambda images: None)
    return (time.perf_counter() - started) * images / (samples * n_views)


def row_builder(
    source: Source, predictor: Predictor, n_views: int, rows: RowFormat, precision: Precision
) -> ShardBuilder:
    """Return a builder whose `compute` makes the rows of any training samples, as the build of a cache does.

    Args:
        source: The data.
        predictor: Runs the teacher.
        n_views: Views of each sample.
        rows: Format of the rows.
        precision: Arithmetic of the teacher.
    """
    return ShardBuilder(
        folder=Path(), plan_digest="", split=source.train, predictor=predictor, spec=source.view_spec, view_seed=0,
        n_views=n_views, rows=rows, precision=precision, coverage=np.empty(0, np.int64), per_shard=1,
    )  # fmt: skip


def estimate_training(
    net: str, source: Source, device: torch.device, *, precision: str, steps: int, batch_size: int, forwards: int
) -> float | None:
    """Return the seconds that training takes, or None if it has few steps.

    Args:
        net: Name of the network.
        source: The data.
        device: Where to compute.
        precision: `fp32`, or `bf16` or `fp16` for mixed precision.
        steps: Steps of training.
        batch_size: Images of a step.
        forwards: Images that are only classified besides.
    """
    if steps < _FEW:
        return None
    with torch.random.fork_rng(devices=[]):
        network = build_net(net, len(source.classes)).train()
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(batch_size, 3, *source.view_spec.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def step() -> None:
        with autocast(device, precision):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]

    def classify() -> None:
        with torch.no_grad(), autocast(device, precision):
            network(images)

    return _timed(step, device) * steps + _timed(classify, device) * forwards / batch_size


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a cache.

    Attributes:
        files: Bytes by the names of files.
        temporary: Bytes of the parts that are put together at the end.
    """

    files: dict[str, int]
    temporary: int

    @property
    def total(self) -> int:
        """Bytes of the finished cache."""
        return sum(self.files.values())


def measure_cache(model: Model, source: Source, *, samples: int, n_views: int, rows: RowFormat) -> CacheSize:
    """Return the bytes of a cache.

    Args:
        model: The teacher.
        source: The data.
        samples: Number of cached samples.
        n_views: Views of each.
        rows: Format of the stored rows.
    """
    place = next(model.net.parameters(), torch.empty(0)).device  # that of its last use
    with torch.no_grad():
        logits, features = forward_with_features(model.net, torch.zeros(1, 3, *source.view_spec.size, device=place))
    width, classes = features.shape[1], logits.shape[1]
    # Of the image as it is, logits and features are also stored in float32.
    identity = {IDENTITY: 4 * samples * classes, FEATURES: 4 * samples * width}
    files = {SHARDS: samples * n_views * rows.row_bytes, **identity}
    if rows.features:
        files[CLASSIFIER] = 4 * classes * (width + 1)
    if samples < len(source.train):
        files[COVERAGE] = 8 * samples
    return CacheSize(files, sum(identity.values()))


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
