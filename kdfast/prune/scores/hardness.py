"""Scores from what one network says of a sample: EL2N, GraNd, the distance to the centre of the class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kdfast.data.stateless_random import IntArray
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import UsageError
from kdfast.prune.rules.base import FloatArray, Option
from kdfast.prune.scores.base import (
    USE,
    Floats32,
    Scored,
    ScoreInputs,
    need_dynamics,
    need_features,
    need_logits,
    takes_dynamics,
)
from kdfast.prune.scores.trajectory import mean_over_runs

if TYPE_CHECKING:
    from kdfast.nets.checkpoint import Model

_PAPER_EPOCH = 20
_BLOCK = 1 << 16  # rows of logits at a time
_IMAGES = 256  # images in a forward and backward pass

_EPOCH = Option(None, "of the dynamics, after how many epochs", low=1, high=1e6, whole=True)
EL2N_OPTIONS = {"use": USE, "epoch": _EPOCH}
GRAND_OPTIONS = {
    "use": USE,
    "epoch": _EPOCH,
    "network": Option(
        "head",
        "gradient of the classifier, in closed form, or of the full network (--teacher)",
        choices=("head", "full"),
    ),
}
MODERATE_OPTIONS = {
    "use": USE,
    "epoch": _EPOCH,
    "fidelity": Option(
        "paper", "centre of a class: mean (paper) or median of each feature (code)", choices=("paper", "code")
    ),
}


def el2n(inputs: ScoreInputs) -> Scored:
    """||softmax(z) - onehot(y)||, the mean over the runs of the dynamics, or the teacher's.

    The default epoch is the 20th, or the last where there are fewer. The paper averages ten runs or more.

    Source:
        Paul et al., Deep Learning on a Data Diet, NeurIPS 2021, definition 2.
    """
    if not takes_dynamics(inputs, "el2n"):
        return Scored(residual_norms(need_logits(inputs, "el2n"), inputs.labels))
    dynamics = need_dynamics(inputs, "el2n")
    epoch = _epoch(inputs, dynamics, range(1, dynamics.epochs + 1))
    return Scored(mean_over_runs(dynamics, lambda run: dynamics.el2n(run)[epoch - 1]), used={"epoch": epoch})


def grand(inputs: ScoreInputs) -> Scored:
    """Norm of the gradient of a sample's own loss.

    In the classifier's weights and bias it is ||softmax(z) - onehot(y)|| sqrt(1 + ||h||^2), with the features h that
    enter it: a closed form, so a sample's norm does not depend on a batch. Of dynamics it is the mean over runs, at the
    epoch nearest the 20th that has features; else the teacher's. `network=full` takes all weights of the network that
    is given, with the images as they are.

    Source:
        Paul et al., Deep Learning on a Data Diet, NeurIPS 2021, definition 1.
    """
    if inputs.options["network"] == "full":
        return Scored(_full_norms(inputs))
    if not takes_dynamics(inputs, "grand"):
        residuals = residual_norms(need_logits(inputs, "grand"), inputs.labels)
        return Scored(residuals * _with_bias(need_features(inputs, "grand")))
    dynamics = need_dynamics(inputs, "grand")
    epoch = _epoch(inputs, dynamics, [kept + 1 for kept in dynamics.feature_epochs])

    def norms(run: int) -> FloatArray:
        lengths: FloatArray = dynamics.el2n(run)[epoch - 1].astype(np.float64)
        return lengths * _with_bias(dynamics.features(run, epoch - 1))

    return Scored(mean_over_runs(dynamics, norms), used={"epoch": epoch})


def moderate(inputs: ScoreInputs) -> Scored:
    """Euclidean distance of the features to the centre of the sample's class; the rule `moderate` keeps the middle.

    Of dynamics it is the mean over runs, at the last epoch that has features.

    Source:
        Xia et al., Moderate Coreset: A Universal Method of Data Selection for Real-world Data-efficient Deep
        Learning, ICLR 2023. The centre is the mean in the paper and the median of each feature in its code.
    """
    median = inputs.options["fidelity"] == "code"
    use = inputs.options["use"]
    if use == "cache" or (use is None and inputs.features is not None):
        return Scored(_distances(need_features(inputs, "moderate"), inputs.labels, median))
    takes_dynamics(inputs, "moderate")
    dynamics = need_dynamics(inputs, "moderate")
    asked = inputs.options["epoch"]
    epoch = dynamics.feature_epochs[-1] + 1 if asked is None and dynamics.feature_epochs else int(asked or 1)

    def distances(run: int) -> FloatArray:
        return _distances(dynamics.features(run, epoch - 1), inputs.labels, median)

    return Scored(mean_over_runs(dynamics, distances), used={"epoch": epoch})


def residual_norms(logits: Floats32, labels: IntArray) -> FloatArray:
    """||softmax(z) - onehot(y)||, float64 (N,), from raw logits: the softmax is taken here, once.

    Args:
        logits: float32 (N, C).
        labels: int64 (N,).
    """
    norms = np.empty(len(labels))
    for start in range(0, len(labels), _BLOCK):
        piece = slice(start, start + _BLOCK)
        residual = np.exp(logits[piece] - logits[piece].max(axis=1, keepdims=True), dtype=np.float64)
        residual /= residual.sum(axis=1, keepdims=True)
        residual[np.arange(len(residual)), labels[piece]] -= 1
        norms[piece] = np.sqrt(np.square(residual, out=residual).sum(axis=1))
    return norms


def _with_bias(features: npt.NDArray[np.float32]) -> FloatArray:
    """sqrt(1 + ||h||^2), float64 (N,)."""
    squares: FloatArray = np.einsum("nd,nd->n", features, features, dtype=np.float64)
    return np.sqrt(1 + squares)


def _distances(features: npt.NDArray[np.float32], labels: IntArray, median: bool) -> FloatArray:
    result = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rows = features[members].astype(np.float64)
        centre = np.median(rows, axis=0) if median else rows.mean(axis=0)
        result[members] = np.linalg.norm(rows - centre, axis=1)
    return result


def _epoch(inputs: ScoreInputs, dynamics: Dynamics, available: range | list[int]) -> int:
    """The epoch asked for, or the available one that is nearest the paper's; counted from 1."""
    if inputs.options["epoch"] is None and available:
        return min(available, key=lambda epoch: abs(epoch - _PAPER_EPOCH))
    asked = inputs.options["epoch"]
    if asked is None or int(asked) not in available:
        held = f"{min(available)} to {max(available)}" if isinstance(available, range) else available or "none"
        raise UsageError(
            f"{dynamics.path} has what this needs after the epochs {held}, not {asked}; take one of those, or record "
            "again with more --epochs or --features-every"
        )
    return int(asked)


def _full_norms(inputs: ScoreInputs) -> FloatArray:
    """Norm of each sample's gradient in all weights of the network, in evaluation mode."""
    from kdfast.data.views import apply_views
    from kdfast.ops.grad_norms import grad_norms

    source, model = inputs.source, _need_network(inputs)
    if source is None:
        raise UsageError("grand of the full network needs the images: give the source with the inputs")
    device = torch.device(inputs.device)
    net = model.net.to(device).eval()
    norms = np.empty(len(inputs.labels))
    for start in range(0, len(norms), _IMAGES):
        ids = np.arange(start, min(start + _IMAGES, len(norms)), dtype=np.int64)
        images = torch.from_numpy(source.train.read(ids)).to(device)
        views = torch.full((len(ids),), source.views.identity)
        batch = apply_views(images, views, source.views, model.normalization, sample_ids=ids)
        found = grad_norms(net, batch, torch.from_numpy(inputs.labels[ids]).to(device))
        norms[ids] = torch.as_tensor(found).double().cpu().numpy()
    return norms


def _need_network(inputs: ScoreInputs) -> Model:
    if inputs.network is None:
        raise UsageError(
            "grand of the full network needs a network: train one with kdfast teacher train --data D --net NAME --out "
            "T.pt, and give --teacher T.pt"
        )
    return inputs.network
