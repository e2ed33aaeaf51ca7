"""Per-sample metrics of a network's logits, computed on their device."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_FLOAT16_MAX = 65504.0

Array = TypeVar("Array", Tensor, npt.NDArray[np.float64])


def el2n(probabilities: Array, labels: Any) -> Array:
    """Return ||p - onehot(y)||_2 of each sample, in the precision of the probabilities.

    NumPy and torch each sum in their own order, so the two differ in the last bits. Recordings need the torch form,
    which runs on the device of the logits; scores of a teacher's cache need the NumPy form in float64. To rank samples
    that the network fits almost perfectly, use `el2n_without_cancellation`: here p_y - 1 loses its digits as p_y
    approaches 1.

    Args:
        probabilities: (N, C), a torch tensor or a NumPy array; overwritten.
        labels: int64 (N,), of the same kind and on the same device.

    Returns:
        (N,), of the same kind.

    Source:
        Paul et al., Deep Learning on a Data Diet, NeurIPS 2021, definition 2.
    """
    if isinstance(probabilities, Tensor):
        probabilities[torch.arange(len(labels), device=probabilities.device), labels] -= 1
        norms: Tensor = torch.linalg.vector_norm(probabilities, dim=1)
        return norms
    probabilities[np.arange(len(labels)), labels] -= 1
    squares = np.square(probabilities, out=probabilities)
    roots: npt.NDArray[np.float64] = np.sqrt(squares.sum(axis=1))
    return roots


def el2n_without_cancellation(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ||softmax(logits) - onehot(y)||_2 of each sample, accurate for confident networks too.

    Use it to rank samples of a network's own training set; it needs more memory than `el2n`.

    Args:
        logits: (N, C), raw.
        labels: int64 (N,), on the same device.

    Returns:
        (N,), in the dtype of the logits.

    Source:
        As `el2n`.
    """
    p = logits.softmax(1)
    # p_y - 1 is computed as minus the sum of the other classes, which does not round to zero for a confident network.
    others = p.scatter(1, labels[:, None], 0)
    errors = others.scatter(1, labels[:, None], -others.sum(1, keepdim=True))
    norms: Tensor = torch.linalg.vector_norm(errors, dim=1)
    return norms


def most_probable(logits: Tensor, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """Return the k most probable classes, the most probable first, and their probabilities, (B, k) each.

    Args:
        logits: float32 (B, C), raw.
        k: At most C.
    """
    top = logits.softmax(1).topk(k, dim=1)
    return top.indices.cpu().numpy(), top.values.half().cpu().numpy()


def compute_metrics(logits: Tensor, labels: Tensor) -> dict[str, npt.NDArray[Any]]:
    """Compute what trajectory scores need of a batch.

    Args:
        logits: float32 (B, C), raw.
        labels: int64 (B,), on the same device.

    Returns:
        float16 (B,) each: `p_y` (probability of the label), `p_other` (largest probability of another class), `margin`
        (logit of the label minus the largest other logit, clamped to the range of float16) and `el2n` (see `el2n`); and
        bool (B,) `correct`.
    """
    rows = torch.arange(len(labels), device=logits.device)
    others = logits.clone()
    others[rows, labels] = -torch.inf
    probabilities = torch.softmax(logits, dim=1)
    values = {
        "p_y": probabilities[rows, labels],
        "p_other": probabilities.scatter(1, labels[:, None], 0).amax(dim=1),
        "margin": (logits[rows, labels] - others.amax(dim=1)).clamp(-_FLOAT16_MAX, _FLOAT16_MAX),
        "el2n": el2n(probabilities, labels),
    }
    metrics: dict[str, npt.NDArray[Any]] = {name: value.half().cpu().numpy() for name, value in values.items()}
    metrics["correct"] = (logits.argmax(dim=1) == labels).cpu().numpy()
    return metrics
