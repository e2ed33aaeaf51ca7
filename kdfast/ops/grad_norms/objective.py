"""The per-sample losses whose gradients are computed, and validation of a model's inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops.softmax_head.residuals import LossConfig, residuals

__all__ = [
    "Loss",
    "Objective",
    "batched_tensors",
    "call_model",
    "check_inputs",
    "iter_tensors",
    "logits_of",
    "replace_tensors",
    "select_samples",
]

Loss = str | Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss with its targets: maps the outputs of a model to losses `(N,)`.

    Attributes:
        loss: "cross_entropy", "kd", or a function (outputs, labels) -> `(N,)`.
        labels: Labels, as the loss requires them.
        teacher: The teacher's logits `(N, C)`, for "kd".
        alpha: As in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        backend: Backend of ``kdfast.kd_loss``.
    """

    loss: Loss
    labels: Any
    teacher: Tensor | None = None
    alpha: float = 0.5
    temperature: float = 4.0
    backend: str = "auto"

    def __call__(self, outputs: Any) -> Tensor:
        """Return the losses without checking them."""
        if callable(self.loss):
            return self.loss(outputs, self.labels)
        logits = logits_of(outputs)
        if self.loss == "cross_entropy":
            assert self.labels is not None
            # In float32, the gradient p_y - 1 of a well-learned sample would be lost to rounding.
            return F.cross_entropy(logits.double(), self.labels, reduction="none")
        # Deferred: only "kd" needs it.
        from kdfast.ops.kd_loss import kd_loss

        assert self.teacher is not None
        options = {"alpha": self.alpha, "temperature": self.temperature, "backend": self.backend}
        return kd_loss(logits, self.labels, self.teacher, reduction="none", **options)  # type: ignore[arg-type]

    def with_targets(self, labels: Tensor | None, teacher: Tensor | None) -> Objective:
        """Return the same loss with other labels and teacher logits."""
        return replace(self, labels=labels, teacher=teacher)

    def select(self, rows: Any) -> Objective:
        """Return the same loss for the samples selected by an index."""
        labels, teacher = (x[rows] if isinstance(x, Tensor) else x for x in (self.labels, self.teacher))
        return self.with_targets(labels, teacher)

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
        config = LossConfig(self.alpha if self.loss == "kd" else 0.0, self.temperature)
        teacher = None if self.teacher is None else self.teacher.detach().double()
        grads = residuals(logits_of(outputs).detach().double(), self.labels, teacher, config)
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

    def _check_targets(self, logits: Tensor) -> None:
        if self.loss not in ("cross_entropy", "kd"):
            raise UsageError(
                f"`loss` is {self.loss!r}: choose 'cross_entropy', 'kd', or a function (outputs, labels) -> (N,)"
            )
        if logits.dim() != 2:
            raise ShapeError(
                f"logits have shape {tuple(logits.shape)}: {self.loss} needs (N, C); pass a function as `loss`"
            )
        if logits.shape[1] < 2:
            raise ShapeError("logits have one class: a softmax needs at least two to have a gradient; check the model")
        if self.loss == "kd":
            _check_teacher(self.teacher, logits)
        if self.labels is None:
            if self.loss == "kd" and self.alpha == 1:
                return
            raise UsageError("`labels` is None: pass labels, except for loss='kd' with alpha=1 or a function as `loss`")
        if not isinstance(self.labels, Tensor):
            raise UsageError(f"`labels` is a {type(self.labels).__name__}: pass an int64 tensor (N,)")
        _check_labels(self.labels, logits)


def _inner_products(outputs: Any, directions: Tensor) -> Tensor:
    return (logits_of(outputs).double() * directions).sum(1)


def _check_teacher(teacher: Tensor | None, logits: Tensor) -> None:
    if teacher is None:
        raise UsageError("`teacher` is None: loss='kd' needs the teacher's logits (N, C)")
    if teacher.shape != logits.shape:
        raise ShapeError(
            f"`teacher` has shape {tuple(teacher.shape)}: pass {tuple(logits.shape)}, the shape of the logits"
        )
    if teacher.device != logits.device:
        raise UsageError(f"`teacher` is on {teacher.device}, the model on {logits.device}: move one of them")


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    n, c = logits.shape
    if labels.shape != (n,):
        raise ShapeError(f"`labels` has shape {tuple(labels.shape)}: pass ({n},), one label per row of the logits")
    if labels.dtype != torch.int64:
        raise ShapeError(f"`labels` has dtype {labels.dtype}: must be int64; convert it with .long()")
    if labels.device != logits.device:
        raise UsageError(f"`labels` is on {labels.device}, the model on {logits.device}: move one of them")
    bad = (labels < 0) | (labels >= c)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise DataError(f"`labels[{at}]` is {int(labels[at])}: must be in [0, {c}), the classes of the logits")


def check_inputs(model: nn.Module, inputs: Any) -> None:
    """Raise unless the inputs are finite tensors on the model's device.

    Raises:
        DataError: If an input is empty or not finite.
        UsageError: If the inputs contain no tensor, or one on another device than the model.
    """
    first = next(model.parameters(), None)
    tensors = list(iter_tensors(inputs))
    if not tensors:
        raise UsageError(
            f"`inputs` is a {type(inputs).__name__} without tensors: pass a tensor, or a tuple or dict with tensors"
        )
    for name, x in tensors:
        if first is not None and x.device != first.device:
            raise UsageError(f"`{name}` is on {x.device}, the model on {first.device}: move one of them")
        if x.dim() and len(x) == 0:
            raise DataError(f"`{name}` is empty, shape {tuple(x.shape)}: pass at least one sample")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise DataError(f"`{name}` contains values that are not finite: remove or repair those samples")


def iter_tensors(inputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the inputs, each with its name for error messages."""
    if isinstance(inputs, Tensor):
        yield "inputs", inputs
    elif isinstance(inputs, Mapping):
        yield from ((f"inputs[{name!r}]", x) for name, x in inputs.items() if isinstance(x, Tensor))
    elif isinstance(inputs, (tuple, list)):
        yield from ((f"inputs[{i}]", x) for i, x in enumerate(inputs) if isinstance(x, Tensor))


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model: pass a mapping by keyword, a tuple or list by position, anything else as the only argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


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


def batched_tensors(inputs: Any, n: int) -> tuple[list[Any], list[Tensor]]:
    """Return the inputs with one entry per sample: their keys (or positions) and the tensors."""
    if isinstance(inputs, Tensor):
        return [None], [inputs]
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    found = [(key, x) for key, x in items if isinstance(x, Tensor) and x.dim() and len(x) == n]
    return [key for key, _ in found], [x for _, x in found]


def select_samples(inputs: Any, n: int, indices: list[int], first_only: bool = False) -> Any:
    """Return the inputs of some of the `n` samples; with ``first_only``, treat only the first input as batched."""
    keys, tensors = batched_tensors(inputs, n)
    if first_only:
        keys, tensors = keys[:1], tensors[:1]
    return replace_tensors(inputs, keys, [x[torch.tensor(indices, device=x.device)] for x in tensors])


def replace_tensors(inputs: Any, keys: list[Any], tensors: list[Tensor]) -> Any:
    """Return the inputs with the tensors at some keys replaced."""
    if isinstance(inputs, Tensor):
        return tensors[0]
    replaced = dict(zip(keys, tensors, strict=True))
    if isinstance(inputs, Mapping):
        return {**inputs, **replaced}
    return tuple(replaced.get(i, x) for i, x in enumerate(inputs))
