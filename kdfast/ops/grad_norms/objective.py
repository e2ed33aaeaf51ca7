"""The per-sample losses whose gradients are computed, and validation of a model's outputs and of the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops.kd_loss.call import TopKTeacher
from kdfast.ops.model_inputs import take_samples
from kdfast.ops.softmax_head.residuals import LossConfig, residuals

__all__ = ["Loss", "Objective", "logits_of"]

Loss = str | Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss with its targets: maps the outputs of a model to losses `(N,)`.

    Attributes:
        loss: "cross_entropy", "kd", or a function (outputs, labels) -> `(N,)`.
        labels: Labels, as the loss requires them.
        teacher: The teacher's logits `(M, C)` or a ``TopKTeacher``, for "kd".
        alpha: As in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        backend: Backend of ``kdfast.kd_loss``.
        rows: As in ``kdfast.kd_loss``.
        ignore_index: As in ``kdfast.kd_loss``.
    """

    loss: Loss
    labels: Any
    teacher: Tensor | TopKTeacher | None = None
    alpha: float = 0.5
    temperature: float = 4.0
    backend: str = "auto"
    rows: Tensor | None = None
    ignore_index: int = -100

    def __call__(self, outputs: Any) -> Tensor:
        """Return the losses without checking them."""
        if callable(self.loss):
            return self.loss(outputs, self.labels)
        logits = logits_of(outputs)
        if self.loss == "kd" and not self._soft:
            return self._divergence(logits, self.labels, self.alpha)
        # In float32, the gradient p_y - 1 of a well-learned sample would be lost to rounding.
        losses = F.cross_entropy(logits.double(), self.labels, reduction="none", ignore_index=self.ignore_index)
        if self.loss == "kd":
            return (1 - self.alpha) * losses + self.alpha * self._divergence(logits, None, 1.0)
        return losses

    def select(self, indices: Any) -> Objective:
        """Return the same loss for the samples selected by an index."""

        def take(x: Tensor) -> Tensor:
            return take_samples(x, indices) if isinstance(indices, list) else x[indices]

        labels, rows = (take(x) if isinstance(x, Tensor) else x for x in (self.labels, self.rows))
        teacher = self.teacher
        if rows is None and teacher is not None:
            teacher = take(teacher) if isinstance(teacher, Tensor) else TopKTeacher(*map(take, teacher))
        return replace(self, labels=labels, rows=rows, teacher=teacher)

    def with_labels(self, labels: Tensor | None) -> Objective:
        """Return the same loss with other labels."""
        return replace(self, labels=labels)

    def require_sliceable_labels(self, option: str) -> None:
        """Raise unless the labels can be split into samples.

        Args:
            option: The option that splits them, for the message.

        Raises:
            UsageError: If the labels are neither None nor a tensor.
        """
        if self.labels is not None and not isinstance(self.labels, Tensor):
            raise UsageError(
                f"{option} splits the labels into samples: pass a tensor as `labels`, not {type(self.labels).__name__}"
            )

    def linearize(self, outputs: Any) -> tuple[Objective, Tensor | None]:
        """Replace the loss by a linear one with its gradients at the logits, scaled to norm 1.

        The gradients at the logits are computed in closed form: for a well-learned sample, subtracting 1 from its
        probability loses all digits to rounding, and squaring the rest may underflow.

        Returns:
            The linear loss and the norms `(N,)` in float64; this objective and None if the loss is a function.
        """
        if callable(self.loss):
            return self, None
        grads = self._logit_gradients(logits_of(outputs).detach().double())
        norms = torch.linalg.vector_norm(grads, dim=1)
        return Objective(_inner_products, grads / torch.where(norms > 0, norms, 1)[:, None]), norms

    def checked_losses(self, outputs: Any) -> Tensor:
        """Return the losses after checking outputs, targets and losses.

        Raises:
            UsageError: If the loss is unknown, or labels or teacher are missing.
            ShapeError: If outputs, labels and teacher do not fit together, or the losses are not `(N,)`.
            DataError: If a label is out of range, or a loss is not finite.
        """
        if not callable(self.loss):
            self._check_targets(logits_of(outputs))
        losses = self(outputs)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            given = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ShapeError(
                f"`loss` returned {given}: must return a tensor (N,), one loss per sample; use reduction='none'"
            )
        if len(losses) == 0:
            raise DataError("the batch is empty: pass at least one sample")
        if isinstance(self.labels, Tensor) and self.labels.dim() and len(self.labels) != len(losses):
            raise ShapeError(
                f"`labels` has {len(self.labels)} entries for {len(losses)} losses: pass one label per sample"
            )
        if not bool(losses.isfinite().all()):
            bad = int((~losses.isfinite()).nonzero()[0])
            raise DataError(f"the loss of sample {bad} is {losses[bad].item()}, without a gradient: check the model")
        if not losses.requires_grad:
            raise UsageError(
                "the loss does not depend on any trainable parameter: set requires_grad on the parameters of interest"
            )
        return losses

    def check_loss(self) -> None:
        """Raise a UsageError if the loss is unknown, or does not use the teacher that is given."""
        if not callable(self.loss) and self.loss not in ("cross_entropy", "kd"):
            raise UsageError(
                f"`loss` is {self.loss!r}: choose 'cross_entropy', 'kd', or a function (outputs, labels) -> (N,)"
            )
        if self.teacher is not None and self.loss != "kd":
            given = "a function" if callable(self.loss) else repr(self.loss)
            raise UsageError(f"`teacher` is given, and `loss` is {given}, without one: pass loss='kd'")

    @property
    def is_linear(self) -> bool:
        """Whether this is the result of ``linearize`` for a named loss."""
        return self.loss is _inner_products

    @property
    def _soft(self) -> bool:
        """Whether the labels are probabilities."""
        return isinstance(self.labels, Tensor) and self.labels.is_floating_point()

    def _divergence(self, logits: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
        # Deferred: only "kd" needs it.
        from kdfast.ops.kd_loss import kd_loss

        assert self.teacher is not None
        options = {"temperature": self.temperature, "backend": self.backend, "ignore_index": self.ignore_index}
        return kd_loss(logits, labels, self.teacher, self.rows, alpha=alpha, reduction="none", **options)  # type: ignore[arg-type]

    def _logit_gradients(self, z: Tensor) -> Tensor:
        """Return the gradients of the losses at float64 logits, `(N, C)`."""
        alpha = self.alpha if self.loss == "kd" else 0.0
        labels, ignored = self.labels, None
        if isinstance(labels, Tensor) and not self._soft:
            ignored = labels == self.ignore_index
            labels = labels.masked_fill(ignored, 0)
        if self._soft or isinstance(self.teacher, TopKTeacher):
            grads = (1 - alpha) * (_soft_residuals(z, labels.double()) if self._soft else _hard_residuals(z, labels))
            if alpha:
                grads = grads + alpha * self._divergence_gradients(z)
        else:
            teacher = None
            if self.teacher is not None and alpha:
                teacher = (self.teacher if self.rows is None else self.teacher[self.rows]).detach().double()
            grads = residuals(z, labels, teacher, LossConfig(alpha, self.temperature))
        return grads if ignored is None else grads.masked_fill(ignored.unsqueeze(1), 0)

    def _divergence_gradients(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            losses = replace(self, backend="reference")._divergence(z, None, 1.0)
            return torch.autograd.grad(losses.sum(), z)[0]

    def _check_targets(self, logits: Tensor) -> None:
        self.check_loss()
        if logits.dim() != 2:
            raise ShapeError(
                f"logits have shape {tuple(logits.shape)}: {self.loss} needs (N, C); pass a function as `loss`"
            )
        if logits.shape[1] < 2:
            raise ShapeError("logits have one class: a softmax needs at least two to have a gradient; check the model")
        if self.loss == "kd":
            _check_teacher(self.teacher, self.rows, logits)
        if self.labels is None:
            if self.loss == "kd" and self.alpha == 1:
                return
            raise UsageError("`labels` is None: pass labels, except for loss='kd' with alpha=1 or a function as `loss`")
        if not isinstance(self.labels, Tensor):
            raise UsageError(f"`labels` is a {type(self.labels).__name__}: pass an int64 tensor (N,)")
        if self._soft and self.labels.dim() == 2:
            _check_soft_labels(self.labels, logits)
        else:
            _check_labels(self.labels, logits, self.ignore_index)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits in a model's outputs: a tensor, an object with ``.logits``, or a mapping with "logits".

    Raises:
        UsageError: If there are none.
    """
    found = outputs
    if not isinstance(found, Tensor):
        found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise UsageError(f"the model returned {type(outputs).__name__} without logits: pass a function as `loss`")
    return found


def _inner_products(outputs: Any, directions: Tensor) -> Tensor:
    return (logits_of(outputs).double() * directions).sum(1)


def _hard_residuals(z: Tensor, labels: Tensor | None) -> Tensor:
    return torch.zeros_like(z) if labels is None else residuals(z, labels, None, LossConfig(0.0))


def _soft_residuals(z: Tensor, s: Tensor) -> Tensor:
    """Return `p_j sum_k s_k - s_j` as `p_j sum_{k != j} s_k - s_j sum_{k != j} p_k`, which does not cancel."""
    p = z.softmax(1)
    return p * _sum_of_others(s) - s * _sum_of_others(p)


def _sum_of_others(x: Tensor) -> Tensor:
    """Return the sum of each row's other entries; next to its largest entry, without cancellation."""
    largest = x.argmax(1, keepdim=True)
    others = x.scatter(1, largest, 0.0).sum(1, keepdim=True)
    return (x.sum(1, keepdim=True) - x).scatter(1, largest, others)


def _check_teacher(teacher: Tensor | TopKTeacher | None, rows: Tensor | None, logits: Tensor) -> None:
    if teacher is None:
        raise UsageError("`teacher` is None: loss='kd' needs the teacher's logits (N, C)")
    values = teacher.values if isinstance(teacher, TopKTeacher) else teacher
    if values.device != logits.device:
        raise UsageError(f"`teacher` is on {values.device}, the model on {logits.device}: move one of them")
    needed = tuple(logits.shape) if rows is None else (len(values), logits.shape[1])
    if not isinstance(teacher, TopKTeacher) and tuple(teacher.shape) != needed:
        raise ShapeError(f"`teacher` has shape {tuple(teacher.shape)}: pass {needed}, with the classes of the logits")
    if rows is None:
        return
    if rows.shape != logits.shape[:1] or rows.dtype != torch.int64 or rows.device != logits.device:
        raise ShapeError(
            f"`rows` is {rows.dtype} of shape {tuple(rows.shape)} on {rows.device}: pass int64 ({len(logits)},) on "
            f"{logits.device}, the teacher's row of each sample"
        )
    bad = (rows < 0) | (rows >= len(values))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise DataError(f"`rows[{at}]` is {int(rows[at])}: must be in [0, {len(values)}), the teacher's rows")


def _check_soft_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape:
        raise ShapeError(f"`labels` has shape {tuple(labels.shape)}: pass {tuple(logits.shape)} probabilities, or (N,)")
    if labels.device != logits.device:
        raise UsageError(f"`labels` is on {labels.device}, the model on {logits.device}: move one of them")
    if not bool((labels >= 0).all() and labels.isfinite().all()):
        raise DataError("`labels` has an entry that is negative or not finite: pass probabilities (N, C)")


def _check_labels(labels: Tensor, logits: Tensor, ignore_index: int) -> None:
    n, c = logits.shape
    if labels.shape != (n,):
        raise ShapeError(f"`labels` has shape {tuple(labels.shape)}: pass ({n},), one label per row of the logits")
    if labels.dtype != torch.int64:
        raise ShapeError(f"`labels` has dtype {labels.dtype}: must be int64; convert it with .long()")
    if labels.device != logits.device:
        raise UsageError(f"`labels` is on {labels.device}, the model on {logits.device}: move one of them")
    bad = ((labels < 0) | (labels >= c)) & (labels != ignore_index)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise DataError(
            f"`labels[{at}]` is {int(labels[at])}: must be in [0, {c}), the classes of the logits, or `ignore_index`"
        )
