"""Knowledge-distillation loss: cross-entropy with the labels plus temperature-scaled KL divergence from a teacher.

For student logits z, teacher logits t, label y, p_T = softmax(z / T) and q_T = softmax(t / T), a row's loss is

    (1 - alpha) CE(softmax(z), y) + alpha T^2 KL(q_T || p_T)

and its gradient (1 - alpha) (softmax(z) - onehot(y)) + alpha T (p_T - q_T). One pass over the logits computes both.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2,
https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from kdfast.errors import ShapeError
from kdfast.ops import backends
from kdfast.ops.kd_loss.autograd import FunctionalKDLoss, kd_loss_op, tie_to_logits
from kdfast.ops.kd_loss.dispatch import Operands, Options, hold_of, kernels, launch, plain_eager
from kdfast.ops.kd_loss.reference import inverse_of, reference_loss, reference_terms
from kdfast.ops.kd_loss.validation import (
    TopKTeacher,
    check_call,
    check_teacher_logits,
    check_temperature,
    check_values,
    number,
    whole,
)

__all__ = ["KDLoss", "TopKTeacher", "kd_loss", "kd_loss_terms", "topk_teacher"]


def kd_loss(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor | TopKTeacher,
    rows: Tensor | None = None,
    *,
    alpha: float = 0.5,
    temperature: float = 4.0,
    t_squared: bool = True,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    direction: str = "forward",
    validate: bool = False,
) -> Tensor:
    """Cross-entropy plus temperature-scaled KL divergence against cached teacher logits.

    Reads float32, bfloat16 or float16, sums in float32 and wider, returns float32; the gradient has the dtype of
    ``logits``. Autocast changes nothing. ``teacher`` and ``rows`` get no gradient, and the loss can be differentiated
    once. float64 logits run on the reference implementation. The gradient is computed with the loss; a factor that
    comes in the backward pass rounds a half-precision one once more, unless it is a power of two.

    A class with logit -inf is masked: it has probability zero. Where the student masks a class that the teacher gives
    mass, the forward divergence is infinite, as it is in the mathematics; NaN logits give a NaN loss.

    Args:
        logits: (N, C) student logits, any strides.
        labels: (N,) int64 classes; None is allowed when ``alpha`` is 1.
        teacher: (M, C) raw teacher logits, any floating dtype the student may have (float64 ones are converted whole at
            each call), on the device of ``logits``; or a ``TopKTeacher``, which holds k classes a row.
        rows: (N,) int64, the teacher's row for each sample, in any order and with repetitions; None: row i for sample
            i, which needs M = N.
        alpha: Weight of the divergence, in [0, 1]; the cross-entropy has 1 - alpha. At 0 the teacher is not read, but
            rows are checked.
        temperature: T > 0, for the divergence only.
        t_squared: Whether the divergence is multiplied by T^2, which keeps its gradient's size independent of T.
        ignore_index: Rows with this label have loss and gradient zero, and do not count in the mean.
        weights: (N,) factors of the rows; a mean divides by the sum of the counted ones.
        reduction: "mean", "sum" or "none". A mean over no row at all is 0.
        backend: "auto", or an implementation named in ``kdfast.ops.backends.TABLE``.
        direction: "forward" for KL(teacher || student), "reverse" for KL(student || teacher).
        validate: Also check on a GPU that labels, rows and class ids lie in their ranges, which waits for the device.
            On a CPU they are always checked, class ids in the rows that are picked. Without the check they are clamped,
            and such rows get NaN: on a GPU, and from the reference implementation when it is compiled or under a
            transform. Has no place in compiled code or under ``torch.func.vmap``.

    Returns:
        The loss: a scalar, or (N,) for "none"; float32 (float64 for float64 logits).

    Raises:
        ShapeError: If shapes do not fit, or alpha or the temperature lies outside its range.
        TypeError: If a dtype or a device does not fit, or the teacher requires a gradient.
        IndexError: If a label, a row or a class id lies outside its range.
        BackendUnavailable: If a named backend cannot run here.

    Source: https://arxiv.org/abs/1503.02531, section 2.
    """
    if weights is None and not torch.compiler.is_compiling() and forward_ad._current_level < 0 and _native_runs():
        plain = kernels("native").plain_kd_loss(
            logits, labels, teacher, rows, alpha, temperature, t_squared, ignore_index, reduction, backend, direction,
            torch.get_num_threads(),
        )  # fmt: skip
        if plain is not None:
            loss: Tensor = plain[0] if plain[1] is None else tie_to_logits(logits, plain)
            return loss
    alpha, temperature = number("alpha", alpha), number("temperature", temperature)
    ignore_index = whole("ignore_index", ignore_index)
    options = Options(alpha, temperature, t_squared, ignore_index, reduction, direction == "reverse")
    operands = check_call(logits, labels, teacher, rows, weights, options, direction)
    name = _backend_of(logits.device.type, logits.dtype, backend)
    if validate or (name == "reference" and _readable(operands)):
        check_values(operands, options, validate)
    if weights is not None and weights.requires_grad and torch.is_grad_enabled():
        return _weighted(operands, options, name)
    return _dispatch(operands, options, name)


def kd_loss_terms(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | TopKTeacher,
    rows: Tensor | None = None,
    *,
    temperature: float = 4.0,
    ignore_index: int = -100,
    backend: str = "auto",
    direction: str = "forward",
) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy and divergence, for logging: without weights, alpha and T^2, and without a gradient.

    Args:
        logits: (N, C) student logits.
        labels: (N,) int64 classes.
        teacher: (M, C) raw teacher logits, or a ``TopKTeacher``.
        rows: (N,) int64 teacher rows, or None.
        temperature: T > 0.
        ignore_index: Rows with this label are 0 in both.
        backend: As in ``kd_loss``.
        direction: As in ``kd_loss``.

    Returns:
        Two tensors (N,), in nats.

    Raises:
        ShapeError, TypeError, IndexError, BackendUnavailable: As ``kd_loss``.
    """
    temperature, ignore_index = number("temperature", temperature), whole("ignore_index", ignore_index)
    if labels is None:
        raise ShapeError("labels are None: kd_loss_terms gives each row's cross-entropy with them")
    options = Options(0.5, temperature, True, ignore_index, "none", direction == "reverse")
    operands = check_call(logits, labels, teacher, rows, None, options, direction)
    operands = operands._replace(logits=logits.detach())
    name = _backend_of(logits.device.type, logits.dtype, backend)
    if name == "native" and not torch.compiler.is_compiling() and plain_eager(operands):
        from kdfast.ops import native

        each = logits.new_empty((2, logits.shape[0]), dtype=torch.float32)
        terms = (each[0], each[1])
        native.kd_loss(*operands, *options, 1.0, False, terms=terms)
        return terms
    if name == "reference":
        if _readable(operands):
            check_values(operands, options, False)
        ce, kl, _ = reference_terms(
            *operands[:6], temperature=temperature, ignore_index=ignore_index, reverse=options.reverse
        )
        return ce, kl
    return (
        _dispatch(operands, options._replace(alpha=0.0), name),
        _dispatch(operands, options._replace(alpha=1.0, t_squared=False), name),
    )


class KDLoss(nn.Module):
    """``kd_loss`` as a module; the arguments that stay the same are given once.

    Args:
        alpha: As in ``kd_loss``; may be changed between calls (``loss.alpha = ...``), but ``torch.compile`` compiles
            again for each new value, and refuses after some: keep a loss that has a schedule out of what is compiled.
        temperature: As in ``kd_loss``.
        **options: ``t_squared``, ``ignore_index``, ``reduction``, ``backend``, ``direction`` and ``validate``, as in
            ``kd_loss``.

    Raises:
        TypeError: On an option that ``kd_loss`` does not have.
    """

    def __init__(self, alpha: float = 0.5, temperature: float = 4.0, **options: Any) -> None:
        super().__init__()
        known = {"t_squared", "ignore_index", "reduction", "backend", "direction", "validate"}
        unknown = sorted(set(options) - known)
        if unknown:
            known_names = ", ".join(["alpha", "temperature", *sorted(known)])
            raise TypeError(f"KDLoss was given {', '.join(unknown)}; its options are {known_names}")
        self.alpha = alpha
        self.temperature = temperature
        self.options: dict[str, Any] = options

    def forward(
        self,
        logits: Tensor,
        labels: Tensor | None,
        teacher: Tensor | TopKTeacher,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``kd_loss``; shapes as there."""
        options: dict[str, Any] = {"alpha": self.alpha, "temperature": self.temperature, **self.options}
        return kd_loss(logits, labels, teacher, rows, weights=weights, **options)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        shown = {"alpha": self.alpha, "temperature": self.temperature, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def topk_teacher(teacher: Tensor, k: int, temperature: float) -> TopKTeacher:
    """Keep the k largest classes of each row of full teacher logits.

    The divergence is then taken over k + 1 outcomes: those classes, and "any other class". For k < C that is a lower
    bound of the full divergence: the teacher no longer says how the rest is spread.

    Args:
        teacher: (M, C) raw logits.
        k: Classes to keep, 1 <= k <= C.
        temperature: The T that the loss will use; the mass of the rest depends on it.

    Raises:
        ShapeError: If the teacher is no (M, C), k lies outside [1, C], or the temperature outside its range.
        TypeError: If the teacher is no tensor of a floating dtype, or k is no whole number.
    """
    check_teacher_logits("teacher", teacher)
    temperature = number("temperature", temperature)
    check_temperature(temperature)
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k is {k!r}: a whole number is needed") from None
    if not 1 <= k <= teacher.shape[1]:
        raise ShapeError(f"k is {k}: it must lie in [1, {teacher.shape[1]}], the number of classes")
    values, classes = teacher.topk(k, 1)
    rest = (teacher.double() / temperature).scatter(1, classes, -torch.inf)
    return TopKTeacher(values, classes.to(torch.int32), rest.logsumexp(1).float())


def _backend_of(device: str, dtype: torch.dtype, backend: str) -> str:
    return backends.resolve("kd_loss", device, str(dtype).removeprefix("torch."), backend)


# What torch.compiler.assume_constant_result does, which imports torch._dynamo: a second, at every start.
_backend_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _native_runs() -> bool:
    return backends.runs("kd_loss", "cpu", "native")


def _readable(operands: Operands) -> bool:
    """Whether values can be looked at without waiting for a device and without disturbing a trace or a transform."""
    return operands.logits.device.type == "cpu" and not torch.compiler.is_compiling() and plain_eager(operands)


def _dispatch(operands: Operands, options: Options, backend: str) -> Tensor:
    if backend == "reference":
        return reference_loss(*operands, **options._asdict())
    logits = operands.logits
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError("kd_loss has no forward-mode derivative: for one, pass backend='reference'")
    if not torch.compiler.is_compiling() and plain_eager(operands):
        if torch.is_grad_enabled() and logits.requires_grad:
            loss, grad = launch(backend, operands._replace(logits=logits.detach()), options, need_grad=True)
            hold = hold_of(logits.dtype, options, operands.weights is not None)
            return tie_to_logits(logits, (loss, (grad, backend, hold)))
        return launch(backend, operands, options, need_grad=False)[0]
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # A wrapped tensor does not say whether an outer transform differentiates it.
        need_grad = torch.is_grad_enabled()
        result = FunctionalKDLoss.apply(*operands, *options, backend, need_grad)  # type: ignore[no-untyped-call]
    else:
        # Nor does one inside of torch.func.vmap that is compiled.
        need_grad = torch.is_grad_enabled() and (logits.requires_grad or torch._C._are_functorch_transforms_active())
        result = kd_loss_op(*operands, *options, backend, need_grad)
    tied: Tensor = result[0]
    return tied


def _weighted(operands: Operands, options: Options, backend: str) -> Tensor:
    """The loss when the weights are to get a gradient too: rows from the kernel, the rest in PyTorch."""
    assert operands.weights is not None
    weights, labels = operands.weights.to(torch.promote_types(operands.weights.dtype, torch.float32)), operands.labels
    if labels is not None:
        weights = torch.where(labels != options.ignore_index, weights, 0)
    loss = _dispatch(operands._replace(weights=None), options._replace(reduction="none"), backend) * weights
    if options.reduction == "none":
        return loss
    if options.reduction == "sum":
        return loss.sum()
    return loss.sum() * inverse_of(weights.sum())
