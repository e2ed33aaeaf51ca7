"""Self-influence over all weights of a network near a flat minimum of its validation loss."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdfast.data.holdout import hold_out
from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import apply_views, view_table
from kdfast.errors import DataError, DataWarning, UsageError
from kdfast.nets.checkpoint import Model
from kdfast.nets.head import find_classifier
from kdfast.ops.grad_norms import fisher_diagonal, grad_norms
from kdfast.pruning.options import Option
from kdfast.pruning.scores.base import HOW_TO_GET, ScoreInputs, ScoreResult
from kdfast.teacher.flatten import FlattenConfig
from kdfast.teacher.flatten.flatten import METADATA_KEY

Parameters = dict[str, Tensor]

# Pixels of a batch: 64 images of 32x32 on a CPU, whose caches larger batches overflow.
_CPU_PIXELS = 1 << 16
_CUDA_PIXELS = 1 << 20

DEFAULT_DAMPING = 1e-3

OPTIONS = {
    "fisher": Option(
        "train",
        "samples of the Fisher: all training samples (train), or those that the teacher was flattened on (validation)",
        choices=("train", "validation"),
    ),
    "damping": Option(
        DEFAULT_DAMPING, "added to the diagonal of the Fisher, in units of its mean over the weights", 1e-9, 1e9
    ),
    "views": Option(1, "views of each sample to average over, the first is the unaugmented one", 1, 1e6, True),
    "layers": Option(
        "all",
        "weights to differentiate: all, or those of the last layer (head), which is faster",
        choices=("all", "head"),
    ),
}


def influence_fvm(inputs: ScoreInputs) -> ScoreResult:
    """Second-order influence of a sample on the validation loss: g^T F^-1 g, large for hard and mislabeled samples.

    g is the gradient of the sample's cross-entropy in all weights of the network, in evaluation mode; F is the diagonal
    of the empirical Fisher, the mean of g * g over samples, plus `damping` times its mean over the weights. A large
    damping gives the ranking of `grand` with network=full.

    At a minimum of the training loss the gradients of training samples vanish, and their ranking with them. So the
    network should be a teacher that was fine-tuned to a flat minimum of the loss on a held-out part of the training
    split (kdfast teacher flatten). Any network is accepted; `used` says which it was. The samples of the held-out part
    are scored like all others, but the network was fitted to them.

    Source:
        Ye et al., Towards Robust Influence Functions with Flat Validation Minima, ICML 2025; Wu et al., Distill on a
        Diet: Efficient Knowledge Distillation via Learnable Data Pruning, 2026, which prunes by it.
    """
    model, source = _network_and_data(inputs)
    everything = np.arange(len(inputs.labels), dtype=np.int64)
    fitted = everything if inputs.options["fisher"] == "train" else held_out_samples(model, source)
    ranks = inputs.distributed
    own, own_fitted = ranks.share(everything), ranks.share(fitted)
    network = _describe(model)
    passes = _Passes(model, source, inputs)
    passes.expect(len(own_fitted) + len(own))
    net = _differentiated(model.net, str(inputs.options["layers"])).to(passes.device)
    squares = fisher_diagonal(net, ((images, labels) for _, images, labels in passes.batches(own_fitted, "Fisher")))
    squares = {name: ranks.sum(value) for name, value in squares.items()}
    metric = damped_metric(squares, len(fitted) * passes.views, inputs.number("damping"))
    total = torch.zeros(len(own), dtype=torch.float64, device=passes.device)
    for ids, images, labels in passes.batches(own, "influence"):
        norms = grad_norms(net, images, labels, metric=metric)
        total[torch.from_numpy(ids - own[0]).to(passes.device)] += torch.as_tensor(norms).double().square()
    return ScoreResult((ranks.gather(total) / passes.views).cpu().numpy(), used={"network": network})


def held_out_samples(model: Model, source: Source) -> IntArray:
    """Return the training samples that a network was flattened on, int64 (n,), ascending.

    Raises:
        UsageError: It was not flattened, or on other data.
    """
    settings = _flattening(model)
    if settings is None:
        raise UsageError(
            "fisher=validation needs a held-out part, and this network was not flattened on one: flatten it with "
            "kdfast teacher flatten, or use fisher=train"
        )
    if settings["data"] != source.fingerprint:
        raise UsageError(
            f"this network was flattened on other data (fingerprint {settings['data'][:12]}, this data "
            f"{source.fingerprint[:12]}), whose held-out part is unknown here: use fisher=train, or flatten it on this "
            "data with kdfast teacher flatten"
        )
    return hold_out(source.train.labels, model.classes, share=settings["held"], seed=settings["seed"])[1]


def damped_metric(squares: Parameters, count: int, damping: float) -> Parameters:
    """Return the diagonal of the damped Fisher: the mean of g * g plus `damping` times its mean over all weights.

    Args:
        squares: Sums of g * g over samples by name of the parameter, as `fisher_diagonal` returns them.
        count: Number of samples.
        damping: Positive.

    Raises:
        DataError: Every gradient is zero.
    """
    weights = sum(value.numel() for value in squares.values())
    mean = sum(float(value.sum()) for value in squares.values()) / count / weights
    if not mean > 0:
        raise DataError("every gradient of the network is zero, so the Fisher is, too: use another network or score")
    return {name: value / count + damping * mean for name, value in squares.items()}


class _Passes:
    """Passes over views of training samples, as a network sees them.

    Args:
        model: The network, for its input normalization.
        source: The data.
        inputs: Inputs of the score.
    """

    def __init__(self, model: Model, source: Source, inputs: ScoreInputs) -> None:
        self.device = torch.device(inputs.device)
        self.views = int(inputs.number("views"))
        self._model, self._source, self._inputs = model, source, inputs
        self._done, self._total = 0, 0
        height, width = source.view_spec.size
        pixels = _CPU_PIXELS if self.device.type == "cpu" else _CUDA_PIXELS
        self._size = max(1, pixels // (height * width))
        if self.views > source.view_spec.count:
            raise UsageError(f"option views={self.views}: this data has {source.view_spec.count} views: lower it")

    def expect(self, samples: int) -> None:
        """Set how many samples all passes together will read, for the progress."""
        self._total = samples

    def batches(self, ids: IntArray, note: str) -> Iterator[tuple[IntArray, Tensor, Tensor]]:
        """Yield positions (b,), images (b, 3, h, w) and labels (b,), once for each view of each sample."""
        spec = self._source.view_spec
        for start in range(0, len(ids), self._size):
            part = ids[start : start + self._size]
            images = torch.from_numpy(self._source.train.read(part)).to(self.device)
            labels = torch.from_numpy(self._inputs.labels[part]).to(self.device)
            for views in view_table(spec, self._inputs.seed, part, self.views).T:
                batch = apply_views(images, torch.from_numpy(views), spec, self._model.normalization, sample_ids=part)
                yield part, batch, labels
            self._done += len(part)
            if self._inputs.progress is not None:
                self._inputs.progress(self._done, self._total, note)


def _flattening(model: Model) -> dict[str, Any] | None:
    """Return the settings with which a network was flattened, or None."""
    found = model.metadata.get(METADATA_KEY)
    return found if isinstance(found, dict) else None


def _describe(model: Model) -> str:
    """Return how the network was flattened; warn if it was not."""
    settings = _flattening(model)
    if settings is not None:
        names = [field.name for field in dataclasses.fields(FlattenConfig)]
        how = ", ".join(f"{name} {settings[name]}" for name in names if settings.get(name) is not None)
        return f"flattened, {how}, teacher {settings['teacher']}"
    warnings.warn(
        "the network was not flattened, so the gradients of samples that it fits vanish: kdfast teacher flatten makes "
        "one whose scores tell them apart",
        DataWarning,
        stacklevel=2,
    )
    return "not flattened"


def _network_and_data(inputs: ScoreInputs) -> tuple[Model, Source]:
    if inputs.network is None:
        raise UsageError(f"influence-fvm needs {HOW_TO_GET['teacher']}")
    if inputs.source is None:
        raise UsageError("influence-fvm needs the images: pass `source`")
    return inputs.network, inputs.source


def _differentiated(net: nn.Module, layers: str) -> nn.Module:
    """Return a copy of the network in evaluation mode, in which only the weights to differentiate require gradients."""
    net = copy.deepcopy(net).eval()
    if layers == "head":
        net.requires_grad_(False)
        find_classifier(net).requires_grad_(True)
    return net
