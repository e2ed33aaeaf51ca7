"""What is recorded of a network's logits, computed on the device they are on."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

_HALF_LIMIT = 65504.0  # the largest float16


def measures(logits: Tensor, labels: Tensor) -> dict[str, npt.NDArray[Any]]:
    """What trajectory scores need of a batch.

    Args:
        logits: float32 (B, C), raw.
        labels: int64 (B,), on the same device.

    Returns:
        float16 (B,) `p_y` (probability of the class), `margin` (logit of the class minus the largest other one, within
        the range of float16) and `el2n` (length of probabilities minus one-hot), and bool (B,) `correct`.
    """
    probabilities = torch.softmax(logits, dim=1)
    rows = torch.arange(len(labels), device=logits.device)
    others = logits.clone()
    others[rows, labels] = -torch.inf
    residual = probabilities.clone()
    residual[rows, labels] -= 1
    values = {
        "p_y": probabilities[rows, labels],
        "margin": (logits[rows, labels] - others.amax(dim=1)).clamp(-_HALF_LIMIT, _HALF_LIMIT),
        "el2n": residual.norm(dim=1),
    }
    halves: dict[str, npt.NDArray[Any]] = {name: value.half().cpu().numpy() for name, value in values.items()}
    halves["correct"] = (logits.argmax(dim=1) == labels).cpu().numpy()
    return halves
