"""The per-sample losses that gradients are taken of, and the checks of what a model is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops.softmax_head.residuals import Target, residuals

__all__ = ["Loss", "Objective", "check_inputs", "joined", "logits_of", "run", "some_samples", "split", "tensors_in"]

Loss = str | Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss with its labels: what comes out of a model to the losses `(N,)`."""

    loss: Loss
    labels: Any
    teacher: Tensor | None = None
    alpha: float = 0.5
    temperature: float = 4.0
    backend: str = "auto"  # of kd_loss

    def __call__(self, outputs: Any) -> Tensor:
        """The losses, without checks."""
        if callable(self.loss):
            return self.loss(outputs, self.labels)
        logits = logits_of(outputs)
        if self.loss == "cross_entropy":
            assert self.labels is not None
            # In float64 the gradient of a sample that is learnt well, p_y - 1, is not lost to rounding.
            return F.cross_entropy(logits.double(), self.labels, reduction="none")
        from kdfast.ops.kd_loss import kd_loss

        assert self.teacher is not None
        options = {"alpha": self.alpha, "temperature": self.temperature, "backend": self.backend}
        return kd_loss(logits, self.labels, self.teacher, reduction="none", **options)  # type: ignore[arg-type]

    def of(self, labels: Tensor | None, teacher: Tensor | None) -> Objective:
        """The same loss for other samples."""
        return replace(self, labels=labels, teacher=teacher)

    def rows(self, rows: Any) -> Objective:
        """The same loss for some of the samples, by an index."""
        labels, teacher = (x[rows] if isinstance(x, Tensor) else x for x in (self.labels, self.teacher))
        return self.of(labels, teacher)

    def require_rows(self, who: str) -> None:
        """Refuse labels that cannot be split into samples.

        Raises:
            UsageError: They are no tensor.
        """
        if self.labels is not None and not isinstance(self.labels, Tensor):
            raise UsageError(f"{who} splits the labels into samples: give a tensor, not {type(self.labels).__name__}")

    def linear(self, outputs: Any) -> tuple[Objective, Tensor | None]:
        """A loss whose gradient at the logits is this one's, made of length 1; and the lengths `(N,)` in float64.

        They come in closed form: where a sample is learnt well, subtracting 1 from its probability loses everything to
        rounding, and so do squares of what is left. A loss of the caller's own stays as it is, without lengths.
        """
        if callable(self.loss):
            return self, None
        target = Target(self.alpha if self.loss == "kd" else 0.0, self.temperature)
        teacher = None if self.teacher is None else self.teacher.detach().double()
        slope = residuals(logits_of(outputs).detach().double(), self.labels, teacher, target)
        lengths = torch.linalg.vector_norm(slope, dim=1)
        return Objective(_along, slope / torch.where(lengths > 0, lengths, 1)[:, None]), lengths

    def checked(self, outputs: Any) -> Tensor:
        """The losses.

        Raises:
            UsageError: There is no such loss, or it lacks labels or teacher.
            ShapeError: Outputs, labels or teacher do not fit together, or the losses are not `(N,)`.
            DataError: A label is out of range, or a loss is not finite.
        """
        if not callable(self.loss):
            self._check(logits_of(outputs))
        losses = self(outputs)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            given = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ShapeError(f"loss returned {given}: a tensor (N,) is needed, one loss a sample; use reduction='none'")
        if len(losses) == 0:
            raise DataError("the batch is empty: at least one sample is needed")
        if isinstance(self.labels, Tensor) and self.labels.dim() and len(self.labels) != len(losses):
            raise ShapeError(f"labels are {len(self.labels)} for {len(losses)} losses: one label a sample is needed")
        if not bool(losses.isfinite().all()):
            bad = int((~losses.isfinite()).nonzero()[0])
            raise DataError(f"the loss of sample {bad} is {losses[bad].item()}: no gradient exists; check the model")
        if not losses.requires_grad:
            raise UsageError("no trainable parameter takes part in the loss: set requires_grad on what is to be scored")
        return losses

    def _check(self, logits: Tensor) -> None:
        if self.loss not in ("cross_entropy", "kd"):
            raise UsageError(
                f"loss={self.loss!r}: choose 'cross_entropy', 'kd', or a function (outputs, labels) -> (N,)"
            )
        if logits.dim() != 2:
            raise ShapeError(
                f"logits have shape {tuple(logits.shape)}: {self.loss} needs (N, C); for others pass a function as loss"
            )
        if logits.shape[1] < 2:
            raise ShapeError("logits have one class: a softmax over fewer than two classes has no gradient")
        if self.loss == "kd":
            _check_teacher(self.teacher, logits)
        if self.labels is None:
            if self.loss == "kd" and self.alpha == 1:
                return
            raise UsageError("labels are None: they may be left out only for loss='kd' with alpha=1, or your own loss")
        if not isinstance(self.labels, Tensor):
            raise UsageError(f"labels are a {type(self.labels).__name__}: give a tensor (N,) of int64")
        check_labels(self.labels, logits)


def _along(outputs: Any, directions: Tensor) -> Tensor:
    return (logits_of(outputs).double() * directions).sum(1)


def _check_teacher(teacher: Tensor | None, logits: Tensor) -> None:
    if teacher is None:
        raise UsageError("loss='kd' needs teacher: the teacher's logits (N, C)")
    if teacher.shape != logits.shape:
        raise ShapeError(f"teacher has shape {tuple(teacher.shape)}: {tuple(logits.shape)} is needed, as logits have")
    if teacher.device != logits.device:
        raise UsageError(f"teacher is on {teacher.device}, the model on {logits.device}: move one of them")


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise unless labels are one class in range for each row of the logits."""
    n, c = logits.shape
    if labels.shape != (n,):
        raise ShapeError(f"labels have shape {tuple(labels.shape)}: ({n},) is needed, one for each row of the logits")
    if labels.dtype != torch.int64:
        raise ShapeError(f"labels are {labels.dtype}: int64 is needed; convert them with .long()")
    if labels.device != logits.device:
        raise UsageError(f"labels are on {labels.device}, the model on {logits.device}: move one of them")
    bad = (labels < 0) | (labels >= c)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise DataError(f"labels[{at}] is {int(labels[at])}: it must lie in [0, {c}), the classes of the logits")


def check_inputs(model: nn.Module, inputs: Any) -> None:
    """Raise unless inputs are finite tensors on the model's device.

    Raises:
        DataError: An input is empty or not finite.
        UsageError: There is no tensor, or one is on another device than the model.
    """
    first = next(model.parameters(), None)
    tensors = list(tensors_in(inputs))
    if not tensors:
        raise UsageError(
            f"inputs are of type {type(inputs).__name__}, without tensors: give a tensor, or a tuple or dict of them"
        )
    for name, x in tensors:
        if first is not None and x.device != first.device:
            raise UsageError(f"{name} is on {x.device}, the model on {first.device}: move one of them")
        if x.dim() and len(x) == 0:
            raise DataError(f"{name} is empty, shape {tuple(x.shape)}: at least one sample is needed")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise DataError(f"{name} holds values that are not finite: remove or mend those samples")


def tensors_in(inputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors among the inputs with the name they have in an error message."""
    if isinstance(inputs, Tensor):
        yield "inputs", inputs
    elif isinstance(inputs, Mapping):
        yield from ((f"inputs[{name!r}]", x) for name, x in inputs.items() if isinstance(x, Tensor))
    elif isinstance(inputs, (tuple, list)):
        yield from ((f"inputs[{i}]", x) for i, x in enumerate(inputs) if isinstance(x, Tensor))


def run(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model: a mapping as keywords, a tuple or list as positions, anything else as the one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returns: a tensor, something with ``.logits``, or a mapping with "logits".

    Raises:
        UsageError: There are none.
    """
    found = outputs
    if not isinstance(found, Tensor):
        found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise UsageError(f"the model returned {type(outputs).__name__} without logits: pass a function as loss")
    return found


def split(inputs: Any, n: int) -> tuple[list[Any], list[Tensor]]:
    """Keys (or positions) of the inputs that hold one entry a sample, and those tensors."""
    if isinstance(inputs, Tensor):
        return [None], [inputs]
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    found = [(key, x) for key, x in items if isinstance(x, Tensor) and x.dim() and len(x) == n]
    return [key for key, _ in found], [x for _, x in found]


def some_samples(inputs: Any, n: int, picked: list[int], first_only: bool = False) -> Any:
    """The inputs of some of `n` samples; ``first_only`` takes no tensor but the first for a batch."""
    keys, tensors = split(inputs, n)
    if first_only:
        keys, tensors = keys[:1], tensors[:1]
    return joined(inputs, keys, [x[torch.tensor(picked, device=x.device)] for x in tensors])


def joined(inputs: Any, names: list[Any], tensors: list[Tensor]) -> Any:
    """The inputs with those tensors replaced."""
    if isinstance(inputs, Tensor):
        return tensors[0]
    replaced = dict(zip(names, tensors, strict=True))
    if isinstance(inputs, Mapping):
        return {**inputs, **replaced}
    return tuple(replaced.get(i, x) for i, x in enumerate(inputs))
