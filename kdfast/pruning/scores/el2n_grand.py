"""EL2N and GraNd: norms of the error vector and of the gradient, from dynamics, a teacher's cache or a network."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from kdfast.data.arrays import rows_of
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import apply_views
from kdfast.dynamics.metrics import el2n
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import UsageError
from kdfast.files.arrays import row_blocks
from kdfast.ops.grad_norms import grad_norms
from kdfast.pruning.options import Only, Option, OptionValue, read_span
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import (
    USE,
    Float32Array,
    ScoreInputs,
    ScoreResult,
    refuse_epochs,
    require_dynamics,
    require_features,
    require_logits,
    use_dynamics,
)
from kdfast.pruning.scores.trajectory import average_over_runs

_PAPER_EPOCH = 20
_IMAGES = 256  # images per forward and backward pass

_EPOCH = Option(
    None,
    f"number of epochs after which the dynamics are read; automatic: the recorded one nearest {_PAPER_EPOCH}",
    low=1,
    high=1e6,
    integer=True,
)
_EPOCHS = Option(
    None,
    "range of epochs over which the score is summed, instead of epoch; automatic: only one epoch. CCS and D2: 1..10",
    low=1,
    high=1e6,
    span=True,
)
EL2N_OPTIONS = {"use": USE, "epoch": _EPOCH, "epochs": _EPOCHS}
_HEAD = Only("with network=head", lambda options: options["network"] == "head")
GRAND_OPTIONS = {
    **{name: dataclasses.replace(option, only=_HEAD) for name, option in EL2N_OPTIONS.items()},
    "network": Option(
        "head",
        "weights to differentiate: the classifier's, in closed form (head), or all of the teacher network (full)",
        choices=("head", "full"),
    ),
}


def el2n_score(inputs: ScoreInputs) -> ScoreResult:
    """||softmax(z) - onehot(y)||: the mean over the runs of the dynamics, or the teacher's.

    The default epoch is the 20th, or the last if there are fewer. The paper averages at least ten runs. `epochs` sums
    over several epochs of each run, as the public codes of CCS and D2 do over the first ten.

    Source:
        Paul et al., Deep Learning on a Data Diet, NeurIPS 2021, definition 2.
    """
    if not _use_dynamics(inputs, "el2n"):
        return ScoreResult(compute_el2n(require_logits(inputs, "el2n"), inputs.labels), used={"use": "cache"})
    dynamics = require_dynamics(inputs, "el2n")
    epochs, used = _epochs(inputs, dynamics, range(1, dynamics.epochs + 1))

    def errors(run: int) -> FloatArray:
        recorded = dynamics.el2n(run)
        total = np.zeros(dynamics.n)
        for epoch in epochs:
            total += recorded[epoch - 1]
        return total

    return ScoreResult(average_over_runs(dynamics, errors), used={"use": "dynamics", **used})


def grand(inputs: ScoreInputs) -> ScoreResult:
    """Norm of the gradient of the sample's own loss.

    For the weights and bias of the classifier it is ||softmax(z) - onehot(y)|| sqrt(1 + ||h||^2), where h are the
    features that enter the classifier: a closed form, so the norm does not depend on a batch. From dynamics it is the
    mean over runs, by default at the epoch nearest the 20th that has features, or the sum over `epochs`, which must all
    have features; otherwise it is the teacher's.
    `network=full` differentiates all weights of the given network on the unaugmented images.

    Source:
        Paul et al., Deep Learning on a Data Diet, NeurIPS 2021, definition 1.
    """
    if inputs.options["network"] == "full":
        return ScoreResult(_full_gradient_norms(inputs))
    if not _use_dynamics(inputs, "grand"):
        errors = compute_el2n(require_logits(inputs, "grand"), inputs.labels)
        return ScoreResult(errors * _norms_with_bias(require_features(inputs, "grand")), used={"use": "cache"})
    dynamics = require_dynamics(inputs, "grand")
    epochs, used = _epochs(inputs, dynamics, [recorded + 1 for recorded in dynamics.feature_epochs])

    def norms(run: int) -> FloatArray:
        errors = dynamics.el2n(run)
        total = np.zeros(dynamics.n)
        for epoch in epochs:
            total += errors[epoch - 1].astype(np.float64) * _norms_with_bias(dynamics.features(run, epoch - 1))
        return total

    return ScoreResult(average_over_runs(dynamics, norms), used={"use": "dynamics", **used})


def compute_el2n(logits: Float32Array, labels: IntArray) -> FloatArray:
    """Return ||softmax(z) - onehot(y)||, float64 (N,), computed in float64, a block of rows at a time.

    Args:
        logits: float32 (N, C), raw.
        labels: int64 (N,).
    """
    norms = np.empty(len(labels))
    for rows, block in row_blocks(logits, rows_of(logits)):
        probabilities = np.exp(block - block.max(axis=1, keepdims=True), dtype=np.float64)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        norms[rows] = el2n(probabilities, labels[rows])
    return norms


def _norms_with_bias(features: npt.NDArray[np.float32]) -> FloatArray:
    """Return sqrt(1 + ||h||^2), float64 (N,)."""
    squares = np.empty(len(features))
    for rows, block in row_blocks(features, rows_of(features)):
        squares[rows] = np.einsum("nd,nd->n", block, block, dtype=np.float64)
    return np.sqrt(1 + squares)


def _use_dynamics(inputs: ScoreInputs, method: str) -> bool:
    """Return whether to read dynamics.

    Raises:
        UsageError: There are neither dynamics nor logits, or epochs are given and there are no dynamics to use.
    """
    from_dynamics = use_dynamics(inputs, method)
    if not from_dynamics:
        refuse_epochs(inputs, method)
    return from_dynamics


def _epochs(
    inputs: ScoreInputs, dynamics: Dynamics, available: range | list[int]
) -> tuple[range, dict[str, OptionValue]]:
    """Return the epochs given, or the available one nearest the paper's, counted from 1; and the option to record."""
    asked, span = inputs.options["epoch"], inputs.options["epochs"]
    if asked is not None and span is not None:
        raise UsageError(f"options epoch={asked} and epochs={span} exclude each other: pass one of them")
    if asked is None and span is None and available:
        asked = min(available, key=lambda epoch: abs(epoch - _PAPER_EPOCH))
    epochs = range(int(asked or 0), int(asked or 0) + 1) if span is None else read_span(span)
    if not set(epochs) <= set(available):
        held = f"{min(available)} to {max(available)}" if isinstance(available, range) else available or "none"
        raise UsageError(
            f"{dynamics.path} has the required values after epochs {held}, not {asked or span}: use one of those, or "
            "record again with kdfast dynamics, for more epochs or with features of other epochs"
        )
    return epochs, {"epoch": asked, "epochs": span}


def _full_gradient_norms(inputs: ScoreInputs) -> FloatArray:
    """Return the norm of each sample's gradient in all weights of the network, in evaluation mode."""
    source, model = inputs.source, inputs.network
    if model is None:
        raise UsageError(
            "grand with network=full needs a network (train one with kdfast teacher train and pass `teacher` to "
            "kdfast score or kdfast prune; kdfast sweep takes the file of kdfast score as `scores`)"
        )
    if source is None:
        raise UsageError("grand of the full network needs the images: pass `source`")
    device = torch.device(inputs.device)
    net = model.net.to(device).eval()
    own = inputs.distributed.share(np.arange(len(inputs.labels), dtype=np.int64))
    norms = torch.empty(len(own), dtype=torch.float64, device=device)
    for start in range(0, len(own), _IMAGES):
        ids = own[start : start + _IMAGES]
        images = torch.from_numpy(source.train.read(ids)).to(device)
        views = torch.full((len(ids),), source.view_spec.identity)
        batch = apply_views(images, views, source.view_spec, model.normalization, sample_ids=ids)
        found = grad_norms(net, batch, torch.from_numpy(inputs.labels[ids]).to(device))
        norms[start : start + len(ids)] = torch.as_tensor(found)
    return inputs.distributed.gather(norms).cpu().numpy()
