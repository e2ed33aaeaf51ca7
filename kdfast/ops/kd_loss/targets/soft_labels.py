"""Soft labels for the kernels of ``kd_loss``, which know classes only: two calls, whose losses and gradients add up.

The cross-entropy with probabilities y is KL(y || softmax(z)) plus the entropy of y: a divergence from a teacher with
logits log y at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.ops.kd_loss.call import KDCall
from kdfast.ops.kd_loss.reference import safe_reciprocal, smoothed_labels

__all__ = ["run_soft_labels"]

_IGNORED = -100


def run_soft_labels(
    kernel: Callable[..., tuple[Tensor, Tensor]], call: KDCall, need_grad: bool, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the loss and the gradient of a call with soft labels; arguments and results as ``dispatch.run_kernel``.

    Rows need not add up to 1: as in ``torch.nn.functional.cross_entropy``, a row's cross-entropy is then that of its
    distribution times the sum.
    """
    assert call.soft_labels is not None
    n = call.logits.shape[0]
    weights = call.logits.new_ones(n, dtype=torch.float32) if call.weights is None else call.weights.float()
    if call.reduction == "mean":
        weights = weights * safe_reciprocal(weights.sum())
    alpha, with_hard, with_soft = _alphas(call)
    loss, result = weights.new_zeros(n), None
    common = call.replace(alphas=None, alpha=1.0, ignore_index=_IGNORED, reduction="none", label_smoothing=0.0)
    if call.use_ce:
        target = smoothed_labels(call.soft_labels, call.label_smoothing).float()
        mass = target.sum(1)
        share = weights * (1 - alpha) * mass
        # The target of KL is normalized by its softmax; the entropy is that of the normalized target, too.
        log_target = target.log()
        entropy = mass.clamp_min(torch.finfo(torch.float32).tiny).log() - torch.where(
            target == 0, 0, target * log_target
        ).sum(1) * safe_reciprocal(mass)
        hard = common.replace(
            labels=with_hard, teacher=torch.where((mass > 0).unsqueeze(1), log_target, 0), rows=None, classes=None,
            tail=None, weights=share, temperatures=None, temperature=1.0, t_squared=False, reverse=False,
            divergence="kl",
        )  # fmt: skip
        loss, result = kernel(hard, need_grad, grad=None if call.use_kl else grad)
        loss = loss + share * entropy
    if call.use_kl:
        of_kl, soft = kernel(common.replace(labels=with_soft, weights=weights * alpha), need_grad, grad=grad)
        loss = loss + of_kl
        result = soft if result is None else (soft.add_(result) if need_grad else soft)
    assert result is not None
    return (loss if call.reduction == "none" else loss.sum()), result


def _alphas(call: KDCall) -> tuple[float | Tensor, Tensor | None, Tensor | None]:
    """Alpha, NaN where it is out of range, and labels that mark the rows without one of the two terms as ignored.

    A term whose weight is 0 must not be computed: it may be infinite.
    """
    if call.alphas is None:
        return call.alpha, None, None
    alpha = call.alphas.float()
    alpha = torch.where((alpha >= 0) & (alpha <= 1), alpha, torch.nan)
    return alpha, torch.where(alpha == 1, _IGNORED, 0), torch.where(alpha == 0, _IGNORED, 0)
