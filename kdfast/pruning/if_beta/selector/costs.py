"""What a search costs, relative to one distillation and to one epoch of the teacher's training."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.nets import build_net
from kdfast.ops.float32 import full_float32
from kdfast.ops.kd_loss import kd_loss
from kdfast.pruning.if_beta.learner import IFBetaResult
from kdfast.pruning.selector import SelectorInputs
from kdfast.teacher.flatten.flatten import METADATA_KEY

# The distillation that the cost of a search is compared with.
_STUDENT, _EPOCHS, _BATCH = "resnet32", 240, 64
_BATCH_PIXELS = 32 * 32 * _BATCH
_WARMUP_STEPS, _TIMED_STEPS = 2, 5


def measure_costs(inputs: SelectorInputs, result: IFBetaResult) -> dict[str, Any]:
    """Return the seconds of flattening, scores and search, and what they are compared with, as JSON values.

    Flattening and scores of another command count with the seconds that they took there. `epoch` is one epoch of plain
    training of the teacher's network on the whole training split, estimated from a few timed steps; `epochs` is the
    cost of everything in such epochs. Both are None if the network cannot be built here.

    Args:
        inputs: Inputs of the selection.
        result: Its search.
    """
    labels, size = inputs.source.train.labels, inputs.source.view_spec.size
    classes = len(inputs.source.classes)
    seconds = {
        "flatten_seconds": _flatten_seconds(inputs),
        "score_seconds": result.score_seconds if inputs.scores is None else inputs.scores.seconds,
    }
    total = sum(seconds.values()) + result.search_seconds
    distillation = distillation_seconds(len(labels), classes, (size[0], size[1]), inputs.device)
    epoch = teacher_epoch(inputs)
    return {
        **seconds,
        "distillation": {"student": _STUDENT, "epochs": _EPOCHS, "seconds": distillation},
        "percent_of_distillation": 100 * total / distillation,
        "epoch": epoch,
        "epochs": None if epoch is None else total / epoch["seconds"],
    }


def distillation_seconds(
    samples: int, classes: int, size: tuple[int, int], device: torch.device | str = "cpu"
) -> float:
    """Estimate the time to distill a ResNet-32 on all samples for 240 epochs from a few timed steps.

    Args:
        samples: N.
        classes: C.
        size: Height and width of the student's inputs.
        device: Device to train on.

    Returns:
        Seconds: the median of five steps, on smaller batches for large images, times the steps of 240 epochs.
    """
    with torch.random.fork_rng(devices=[]):
        net = build_net(_STUDENT, classes)
    return _EPOCHS * _epoch_seconds(net, samples, classes, size, torch.device(device), distilled=True)


def teacher_epoch(inputs: SelectorInputs) -> dict[str, Any] | None:
    """Return the name of the teacher's network and the estimated seconds of one epoch of its training."""
    source, name = inputs.source, str(inputs.cache.manifest["teacher"]["net"])
    classes = len(source.classes)
    try:
        with torch.random.fork_rng(devices=[]):
            net = build_net(name, classes)
    except UsageError:  # a network of a library that is not installed here
        return None
    height, width = source.view_spec.size
    seconds = _epoch_seconds(
        net, len(source.train), classes, (height, width), torch.device(inputs.device), distilled=False
    )
    return {"network": name, "seconds": seconds}


def _flatten_seconds(inputs: SelectorInputs) -> float:
    """Return the time in which the network behind the scores was flattened; 0 if it was not, or is not known."""
    network, scores = inputs.network, inputs.scores
    if network is None or scores is None or scores.sources.get("teacher") != network.digest:
        return 0.0
    return float(network.metadata.get(METADATA_KEY, {}).get("seconds", 0.0))


@full_float32()
def _epoch_seconds(
    net: nn.Module, samples: int, classes: int, size: tuple[int, int], device: torch.device, *, distilled: bool
) -> float:
    """Estimate the time of one epoch from the median of five steps, on smaller batches for large images."""
    batch = max(2, min(_BATCH, _BATCH_PIXELS // (size[0] * size[1])))
    net = net.to(device).train()
    images = torch.zeros(batch, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % classes
    teacher = torch.zeros(batch, classes, device=device)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    # A network with dropout draws from the global generators.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seconds = []
        for _ in range(_WARMUP_STEPS + _TIMED_STEPS):
            started = time.perf_counter()
            optimizer.zero_grad()
            logits = net(images)
            torch.autograd.backward(kd_loss(logits, labels, teacher) if distilled else F.cross_entropy(logits, labels))
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[_WARMUP_STEPS:]) * math.ceil(samples / batch)
