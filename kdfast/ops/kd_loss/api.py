"""Knowledge-distillation loss: cross-entropy with the labels plus temperature-scaled KL divergence from a teacher.

For student logits z, teacher logits t, label y, p_T = softmax(z / T) and q_T = softmax(t / T), the loss of a row is

    (1 - alpha) CE(softmax(z), y) + alpha T^2 KL(q_T || p_T)

and its gradient is (1 - alpha) (softmax(z) - onehot(y)) + alpha T (p_T - q_T). One pass over the logits computes both.
Other divergences can take the place of KL(q_T || p_T).

All calls follow the same path: ``validation.make_call`` checks the arguments and makes a ``KDCall``, ``dispatch``
chooses the backend, and ``autograd`` runs its kernel and connects the result with the logits. ``fast_path`` is a
shortcut for common calls on a CPU.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2,
https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import ShapeError
from kdfast.ops.kd_loss.autograd import detached_terms, differentiable_loss, values_are_readable
from kdfast.ops.kd_loss.call import KDCall, TopKTeacher
from kdfast.ops.kd_loss.dispatch import choose_backend
from kdfast.ops.kd_loss.fast_path import try_kd_loss
from kdfast.ops.kd_loss.reference import reference_loss, reference_terms, safe_reciprocal
from kdfast.ops.kd_loss.targets.forms import check_kind, flat_arguments, with_class_weights, with_logits
from kdfast.ops.kd_loss.targets.values import check_class_weights, check_values
from kdfast.ops.kd_loss.validation import (
    as_float,
    check_teacher_logits,
    check_temperature,
    make_call,
)

__all__ = ["KDLoss", "TopKTeacher", "kd_loss", "kd_loss_terms", "topk_teacher"]


def kd_loss(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor | TopKTeacher,
    rows: Tensor | None = None,
    *,
    alpha: float | Tensor = 0.5,
    temperature: float | Tensor = 4.0,
    t_squared: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    direction: str = "forward",
    divergence: str = "kl",
    jsd_beta: float = 0.5,
    dkd_weights: tuple[float, float] = (1.0, 8.0),
    validate: bool = False,
    class_weights: Tensor | None = None,
    teacher_kind: str = "logits",
) -> Tensor:
    """Cross-entropy plus temperature-scaled KL divergence against cached teacher logits.

    Logits may be float32, bfloat16 or float16; sums are accumulated in float32 or wider, the loss is float32, and the
    gradient has the dtype of ``logits``. float64 logits run on the reference implementation. Autocast has no effect.
    ``teacher`` and ``rows`` get no gradient, and the loss can be differentiated once. The gradient is computed together
    with the loss. In half precision, multiplying the loss rounds the gradient again, unless by a power of two.

    A class whose logit is -inf is masked: its probability is zero. If the student masks a class to which the teacher
    gives probability, the forward divergence is infinite. NaN logits give a NaN loss.

    With p = softmax(z / T) of the student and q = softmax(t / T) of the teacher, ``divergence`` is one of:

    - "kl": KL(q || p), or KL(p || q) with ``direction="reverse"``.
    - "jsd": beta KL(q || m) + (1 - beta) KL(p || m) with the mixture m = beta q + (1 - beta) p, beta = ``jsd_beta``. At
      most log 2, also if one of them masks a class. Source: Agarwal et al., On-Policy Distillation of Language Models,
      ICLR 2024, https://arxiv.org/abs/2306.13649, equation 1.
    - "dkd": alpha KL((q_y, 1 - q_y) || (p_y, 1 - p_y)) + beta KL(q' || p'), where q' and p' are the distributions over
      the classes other than the label y, and (alpha, beta) = ``dkd_weights``. The second part is 0 if the teacher masks
      all of them; a part of weight 0 is left out, even if it is infinite. Source: Zhao et al., Decoupled Knowledge
      Distillation, CVPR 2022, https://arxiv.org/abs/2203.08679, equation 7.
    - "standardized": KL(q || p) of logits standardized in each row, (z - mean) / (std + 1e-7), with the unbiased
      standard deviation; both are over the classes that are not masked. Source: Sun et al., Logit Standardization in
      Knowledge Distillation, CVPR 2024, https://arxiv.org/abs/2403.01427, algorithm 1.

    The cross-entropy always is that of the logits themselves. Alpha and temperature may differ from sample to sample.

    Args:
        logits: (N, C) student logits, any strides. Leading dimensions (..., C) are flattened, also those of the other
            arguments that have one entry per row.
        labels: (N,) int64 classes, or (N, C) floating-point probabilities, as those of mixed images; may be None if
            ``alpha`` is 1, except for "dkd", which needs classes. With probabilities y the cross-entropy is
            -sum y log softmax(z), and no row is ignored.
        teacher: (M, C) raw teacher logits on the device of ``logits``, in any floating dtype (float64 is converted to
            float32 at each call); or, for "kl", a ``TopKTeacher``, which holds k classes per row.
        rows: (N,) int64, the teacher's row for each sample, in any order, repeats allowed. None: row i for sample i,
            which requires M = N.
        alpha: Weight of the divergence, in [0, 1]; the weight of the cross-entropy is 1 - alpha. At 0 the teacher is
            not read, but ``rows`` is still checked. A number, or a floating-point tensor (N,) on the device of
            ``logits``, one for each sample; a tensor gets no gradient.
        temperature: T > 0; applies to the divergence only. A number or a tensor (N,), like ``alpha``.
        t_squared: Whether to multiply the divergence by T^2, its sample's, which makes the size of its gradient
            independent of T.
        label_smoothing: The target of the cross-entropy is (1 - s) onehot + s / C, as in
            ``torch.nn.functional.cross_entropy``; s at least 0 and below 1. If s is not 0 and the student masks a
            class, the cross-entropy is infinite.
        ignore_index: Rows with this label have zero loss and gradient and are not counted in the mean.
        weights: (N,) sample weights; the mean divides by the sum of the weights of non-ignored rows.
        reduction: "mean", "sum" or "none". The mean over no rows is 0.
        backend: "auto", or a backend named in ``kdfast.ops.backends.TABLE``.
        direction: "forward" for KL(teacher || student), "reverse" for KL(student || teacher); "kl" only.
        divergence: "kl", "jsd", "dkd" or "standardized", as defined above.
        jsd_beta: Share of the teacher in the mixture of "jsd", above 0 and below 1; 1/2 is symmetric.
        dkd_weights: Weights alpha and beta of the two parts of "dkd", not negative.
        validate: On a GPU, also check that labels, rows, class ids, and alpha and temperature of each sample are in
            range, and that no class repeats within a row, which synchronizes with the device. On a CPU that is always
            checked (class ids only in the rows that are used). Where it is not checked (on a GPU, and in the reference
            implementation when compiled or transformed), an index out of range is clamped, and its row gets NaN, like
            one whose alpha or temperature is out of range; a class that repeats on a GPU makes its row wrong. Not
            available in compiled code or under ``torch.func.vmap``.
        class_weights: (C,) factor of the cross-entropy of the rows with that label, not negative. The divisor of a mean
            stays the sum of ``weights``, unlike in ``torch.nn.functional.cross_entropy``. With soft labels, each
            class's probability is multiplied. Not together with ``label_smoothing``.
        teacher_kind: What a teacher of all classes holds: "logits", "logprobs" for their logarithmic softmax, which are
            logits, too, or "probs" for probabilities at temperature 1, whose logarithms are taken at each call.

    Returns:
        The loss: a scalar, or (N,) for "none"; float32, or float64 for float64 logits.

    Raises:
        ShapeError: If shapes do not fit, a number or a name is out of range, a class repeats within a row of a
            ``TopKTeacher``, or the divergence does not support one.
        TypeError: If a dtype or a device does not fit, or the teacher requires a gradient.
        IndexError: If a label, a row or a class id is out of range.
        BackendUnavailable: If a named backend cannot run here.

    Source: https://arxiv.org/abs/1503.02531, section 2.
    """
    if weights is None and class_weights is None and teacher_kind == "logits":
        loss = try_kd_loss(
            logits, labels, teacher, rows, alpha, temperature, t_squared, ignore_index, reduction, direction, backend,
            divergence, jsd_beta, dkd_weights, label_smoothing,
        )  # fmt: skip
        if loss is not None:
            return loss
    lead = None
    if isinstance(logits, Tensor) and logits.dim() > 2:
        lead = logits.shape[:-1]
        logits, labels, teacher, rows, (weights, alpha, temperature) = flat_arguments(
            logits, labels, teacher, rows, (weights, alpha, temperature)
        )
    call = make_call(
        logits,
        labels,
        teacher,
        rows,
        weights,
        alpha=alpha,
        temperature=temperature,
        t_squared=t_squared,
        ignore_index=ignore_index,
        reduction=reduction,
        direction=direction,
        divergence=divergence,
        jsd_beta=jsd_beta,
        dkd_weights=dkd_weights,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
    )
    check_kind(teacher_kind, call.classes is None)
    if class_weights is not None:
        if validate or values_are_readable(call):
            check_class_weights(class_weights)
        call = with_class_weights(call, class_weights)
    backend = choose_backend(logits.device.type, logits.dtype, backend, call.operator)
    checked = backend == "reference" or call.soft_labels is not None or teacher_kind == "probs"
    if validate or (checked and values_are_readable(call)):
        check_values(call, thorough=validate, has_probs=teacher_kind == "probs")
    if teacher_kind == "probs":
        call = with_logits(call)
    if call.weights is not None and call.weights.requires_grad and torch.is_grad_enabled():
        loss = _differentiable_in_weights(call, backend)
    else:
        loss = _run(call, backend)
    return loss if lead is None or reduction != "none" else loss.reshape(lead)


def kd_loss_terms(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | TopKTeacher,
    rows: Tensor | None = None,
    *,
    temperature: float | Tensor = 4.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str = "auto",
    direction: str = "forward",
    divergence: str = "kl",
    jsd_beta: float = 0.5,
    dkd_weights: tuple[float, float] = (1.0, 8.0),
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence of each row, for logging: without gradient, weights, alpha and T^2.

    Args:
        logits: (N, C) student logits.
        labels: (N,) int64 classes, or (N, C) probabilities.
        teacher: (M, C) raw teacher logits, or a ``TopKTeacher``; of probabilities, pass the logarithm.
        rows: (N,) int64 teacher rows, or None.
        temperature: T > 0, or (N,) one for each sample.
        label_smoothing: As in ``kd_loss``.
        ignore_index: Rows with this label are 0 in both terms.
        backend: As in ``kd_loss``.
        direction: As in ``kd_loss``.
        divergence: As in ``kd_loss``.
        jsd_beta: As in ``kd_loss``.
        dkd_weights: As in ``kd_loss``.

    Returns:
        Two float32 tensors (N,), in nats; float64 for float64 logits.

    Raises:
        ShapeError, TypeError, IndexError, BackendUnavailable: As ``kd_loss``.
    """
    if labels is None:
        raise ShapeError("`labels` are None: kd_loss_terms needs them for each row's cross-entropy")
    call = make_call(
        logits,
        labels,
        teacher,
        rows,
        None,
        alpha=0.5,
        temperature=temperature,
        t_squared=True,
        ignore_index=ignore_index,
        reduction="none",
        direction=direction,
        divergence=divergence,
        jsd_beta=jsd_beta,
        dkd_weights=dkd_weights,
        label_smoothing=label_smoothing,
    )
    backend = choose_backend(logits.device.type, logits.dtype, backend, call.operator)
    call = call.replace(logits=logits.detach())
    if backend != "reference":
        return detached_terms(call, backend)
    if values_are_readable(call):
        check_values(call, thorough=False)
    ce, kl, _ = reference_terms(call)
    return ce, kl


class KDLoss(nn.Module):
    """``kd_loss`` as a module with fixed options.

    Args:
        alpha: As in ``kd_loss``. May be changed between calls (``loss.alpha = ...``), but ``torch.compile`` recompiles
            for each new value and gives up after several: do not compile a loss whose alpha follows a schedule.
        temperature: As in ``kd_loss``.
        **options: ``t_squared``, ``label_smoothing``, ``ignore_index``, ``reduction``, ``backend``, ``direction``,
            ``divergence``, ``jsd_beta``, ``dkd_weights``, ``validate``, ``class_weights`` and ``teacher_kind``, as in
            ``kd_loss``. The class weights are a buffer, as in ``torch.nn.CrossEntropyLoss``.

    Raises:
        TypeError: If ``kd_loss`` has no such option.
    """

    class_weights: Tensor | None

    def __init__(self, alpha: float | Tensor = 0.5, temperature: float | Tensor = 4.0, **options: Any) -> None:
        super().__init__()
        known = {
            "t_squared", "label_smoothing", "ignore_index", "reduction", "backend", "direction", "divergence",
            "jsd_beta", "dkd_weights", "validate", "class_weights", "teacher_kind",
        }  # fmt: skip
        unknown = sorted(set(options) - known)
        if unknown:
            known_names = ", ".join(["alpha", "temperature", *sorted(known)])
            raise TypeError(
                f"KDLoss was given {', '.join(f'`{name}`' for name in unknown)}; its options are {known_names}"
            )
        self.alpha = alpha
        self.temperature = temperature
        self.options: dict[str, Any] = options
        self.register_buffer("class_weights", options.pop("class_weights", None))

    def forward(
        self,
        logits: Tensor,
        labels: Tensor | None,
        teacher: Tensor | TopKTeacher,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; shapes as in ``kd_loss``."""
        options: dict[str, Any] = {"alpha": self.alpha, "temperature": self.temperature, **self.options}
        return kd_loss(logits, labels, teacher, rows, weights=weights, class_weights=self.class_weights, **options)

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        shown = {"alpha": self.alpha, "temperature": self.temperature, **self.options}
        if self.class_weights is not None:
            shown["class_weights"] = self.class_weights
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def topk_teacher(teacher: Tensor, k: int, temperature: float) -> TopKTeacher:
    """Keep the k largest classes of each row of teacher logits.

    The divergence is then computed over k + 1 outcomes: those classes, and "any other class". For k < C it is a lower
    bound of the full divergence, since the teacher's distribution over the other classes is lost.

    Args:
        teacher: (M, C) raw logits.
        k: Classes to keep, 1 <= k <= C.
        temperature: The T of the loss; the mass of the other classes depends on it.

    Raises:
        ShapeError: If the teacher is not (M, C), or k or the temperature is out of range.
        TypeError: If the teacher is not a floating-point tensor, or k is not an integer.
    """
    check_teacher_logits("teacher", teacher)
    temperature = as_float("temperature", temperature)
    check_temperature(temperature)
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"`k` is {k!r}: pass an integer") from None
    if not 1 <= k <= teacher.shape[1]:
        raise ShapeError(f"`k` is {k}: must be in [1, {teacher.shape[1]}], the number of classes")
    values, classes = teacher.topk(k, 1)
    rest = (teacher.double() / temperature).scatter(1, classes, -torch.inf)
    return TopKTeacher(values, classes.to(torch.int32), rest.logsumexp(1).float())


def _run(call: KDCall, backend: str) -> Tensor:
    return reference_loss(call) if backend == "reference" else differentiable_loss(call, backend)


def _differentiable_in_weights(call: KDCall, backend: str) -> Tensor:
    """Return the loss when the weights also need a gradient: PyTorch weights and reduces the rows of the kernel."""
    assert call.weights is not None
    weights = call.weights.to(torch.promote_types(call.weights.dtype, torch.float32))
    if call.hard_labels is not None:
        weights = torch.where(call.hard_labels != call.ignore_index, weights, 0)
    loss = _run(call.replace(weights=None, reduction="none"), backend) * weights
    if call.reduction == "none":
        return loss
    if call.reduction == "sum":
        return loss.sum()
    return loss.sum() * safe_reciprocal(weights.sum())
