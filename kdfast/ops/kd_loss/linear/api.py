"""``linear_kd_loss``: the distillation loss of a model's last layer, without the logits of all tokens.

The logits of the last layer are the largest tensor in the training of a language model: (tokens, vocabulary). Here they
exist for one chunk of tokens at a time. The kernel of ``kd_loss`` computes the loss of a chunk and writes its gradient
over the logits, and two matrix products turn it into gradients of hidden states and weights.

Source of the chunked computation of a last layer with its loss: Hsu et al., Liger Kernel, 2024,
https://arxiv.org/abs/2410.10989, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.errors import ShapeError, UsageError
from kdfast.ops import _torch_compat
from kdfast.ops.kd_loss.call import KDCall, TopKTeacher
from kdfast.ops.kd_loss.dispatch import choose_backend
from kdfast.ops.kd_loss.linear.autograd import differentiable_loss
from kdfast.ops.kd_loss.linear.call import LinearCall, LinearTeacher
from kdfast.ops.kd_loss.linear.reference import linear_kd_loss_reference
from kdfast.ops.kd_loss.linear.shards import Shard, check_shard, make_shard
from kdfast.ops.kd_loss.linear.validation import Options, make_linear_call
from kdfast.ops.kd_loss.targets.values import check_class_weights, check_values

__all__ = ["LinearTeacher", "linear_kd_loss"]


def linear_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    teacher: Tensor | TopKTeacher | LinearTeacher | tuple[Tensor, ...],
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    alpha: float | Tensor = 0.5,
    temperature: float | Tensor = 4.0,
    t_squared: bool = True,
    divergence: str = "forward",
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
    teacher_kind: str = "logits",
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    chunk: int | str = "auto",
    memory: str = "fast",
    backend: str = "auto",
    validate: bool = False,
    group: Any = None,
) -> Tensor:
    """``kd_loss`` of the logits ``hidden @ weight.T + bias``, holding those of one chunk of tokens at a time.

    The logits are z = cap(logit_scale (hidden W^T + bias)), where cap(x) = softcap tanh(x / softcap) if ``softcap`` is
    given. They have the dtype of ``hidden``, or that of ``torch.autocast`` where it is enabled; the loss of a row is
    computed from them as by ``kd_loss``, and its gradient is rounded to their dtype. Gradients of weights and bias are
    summed in float32 or wider. Those of tensors that need none are not computed. The loss can be differentiated once.

    On a CPU, ignored rows are left out before anything is computed.

    Args:
        hidden: (N, H) hidden states, or (..., H); any strides. float32, bfloat16, float16 or float64.
        weight: (V, H) weights of the last layer.
        labels: (N,) int64 classes, shaped like the leading dimensions of ``hidden``; or (N, V) probabilities. May be
            None if ``alpha`` is 1.
        teacher: One of three. Teacher logits (M, V). A ``TopKTeacher``. Or the teacher's own last layer, as a
            ``LinearTeacher`` or a tuple (hidden (M, K), weight (V, K)[, bias (V,)]): the exact divergence, although its
            logits are held for one chunk only, too; they have the dtype of its weights.
        rows: (N,) int64, the teacher's row for each row of ``hidden``. None: row i for row i.
        bias: (V,), in the dtype of ``weight``.
        alpha: As in ``kd_loss``; a number, or a tensor with one per row.
        temperature: As in ``kd_loss``; a number, or a tensor with one per row.
        t_squared: As in ``kd_loss``.
        divergence: "forward" for KL(teacher || student), "reverse" for KL(student || teacher), "jsd" for the
            generalized Jensen-Shannon divergence, which needs a teacher of all classes.
        beta: Share of the teacher in the mixture of "jsd", above 0 and below 1.
        label_smoothing: As in ``kd_loss``.
        class_weights: As in ``kd_loss``.
        weights: (N,) weight of each row, without a gradient.
        teacher_kind: As in ``kd_loss``; for a ``LinearTeacher``, "logits".
        ignore_index: Rows with this label have zero loss and gradient and are not counted in the mean.
        softcap: Bound of the logits, positive; None for no bound.
        logit_scale: Factor of the logits, positive.
        reduction: "mean", "sum" or "none". The mean over no rows is 0.
        num_items: Divisor of the mean in place of the sum of the weights of the rows that are not ignored: the number
            of tokens of all micro-batches or processes, whose losses then add up. A number or a scalar tensor.
        chunk: Rows whose logits are held at a time. "auto": 128 on a CPU, 256 in half precision, and 1,024 on a GPU;
            but for trained weights in half precision all rows up to 2 H, which takes less memory than a float32 sum of
            their gradient.
        memory: "fast" computes the gradients with the loss, and keeps those of hidden states and weights until the
            backward pass. "low" keeps none and computes the logits again in the backward pass. Also computed there are
            float16 gradients, since they need the factor of a ``GradScaler``, and those of weights and bias with the
            reduction "none".
        backend: "auto", or a backend named in ``kdfast.ops.backends.TABLE`` for ``kd_loss``. "reference" is plain
            PyTorch on the logits of all rows, differentiable more than once.
        validate: As in ``kd_loss``.
        group: A process group of ``torch.distributed`` over which the classes are split, in the order of its ranks.
            Each process passes the same ``hidden`` and ``labels``, and its own rows of ``weight``, entries of ``bias``
            and columns of the teacher's logits or rows of its weights. Loss and gradient of ``hidden`` are those of all
            classes, in all processes. Plain PyTorch in each chunk; no ``TopKTeacher``, soft labels, class weights,
            ``torch.compile``.

    Returns:
        The loss: a scalar, or for "none" shaped like the leading dimensions of ``hidden``; float32, or float64 for
        float64 logits.

    Raises:
        ShapeError: If shapes do not fit, or a number or a name is out of range.
        TypeError: If a dtype or a device does not fit, or the teacher or ``weights`` require a gradient.
        IndexError: If a label, a row or a class id is out of range.
        BackendUnavailable: If a named backend cannot run here.
        RuntimeError: If forward-mode differentiation or a transform of ``torch.func`` is active.

    Source: https://arxiv.org/abs/1503.02531, section 2; https://arxiv.org/abs/2410.10989, section 3.
    """
    options: Options = {
        "bias": bias, "alpha": alpha, "temperature": temperature, "t_squared": t_squared, "divergence": divergence,
        "beta": beta, "label_smoothing": label_smoothing, "class_weights": class_weights, "weights": weights,
        "teacher_kind": teacher_kind, "ignore_index": ignore_index, "softcap": softcap, "logit_scale": logit_scale,
        "reduction": reduction, "num_items": num_items, "chunk": chunk, "memory": memory,
    }  # fmt: skip
    call, kd = make_linear_call(hidden, weight, labels, teacher, rows, options)
    if group is not None:
        shard = _make_shard(call, kd, group, options)
        loss = differentiable_loss(call, "reference", memory, shard)
        return loss.reshape(hidden.shape[:-1]) if call.reduction == "none" else loss
    chosen = choose_backend(call.hidden.device.type, call.dtype, backend, kd.operator)
    plain = not torch.compiler.is_compiling() and _torch_compat.is_plain_eager(call.tensors)
    readable = plain and hidden.device.type == "cpu"
    if validate or readable:
        check_values(kd, thorough=validate, has_probs=call.has_probs)
        if class_weights is not None:
            check_class_weights(class_weights)
    if backend == "reference" or (chosen == "reference" and not plain):
        return linear_kd_loss_reference(hidden, weight, labels, teacher, rows, **options)
    kept = _counted_rows(call) if readable else None
    loss = differentiable_loss(call if kept is None else _select(call, kept), chosen, memory)
    if call.reduction != "none":
        return loss
    if kept is not None:
        loss = loss.new_zeros(call.hidden.shape[0]).index_copy(0, kept, loss)
    return loss.reshape(hidden.shape[:-1])


def _make_shard(call: LinearCall, kd: KDCall, group: Any, options: Options) -> Shard:
    """Check a call whose classes are split over a group, and return those of this process."""
    if torch.compiler.is_compiling() or not _torch_compat.is_plain_eager(call.tensors):
        raise UsageError("`group` is given in compiled code or under a mode: call linear_kd_loss in eager mode")
    if options["class_weights"] is not None:
        raise ShapeError("`class_weights` cannot be split by `group`: pass `weights`, the factor of each row")
    shard = make_shard(group, call.weight)
    check_shard(kd, shard, readable=call.hidden.device.type == "cpu")
    return shard


def _counted_rows(call: LinearCall) -> Tensor | None:
    """The rows that are not ignored, or None if that is all of them."""
    if call.labels is None or call.labels.is_floating_point():
        return None
    counted = call.labels != call.ignore_index
    return None if bool(counted.all()) else counted.nonzero().squeeze(1)


def _select(call: LinearCall, kept: Tensor) -> LinearCall:
    """The call over some of its rows."""

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, kept)

    hidden, weight, bias, labels, teacher, rows, classes, tail, factors, alphas, temperatures, *others = call
    of_rows = (pick(factors), pick(alphas), pick(temperatures))
    teacher_rows = kept if rows is None else pick(rows)
    picked = (pick(hidden), weight, bias, pick(labels), teacher, teacher_rows, classes, tail, *of_rows)
    return LinearCall(*picked, *others)  # type: ignore[arg-type]
