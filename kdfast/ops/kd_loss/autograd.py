"""Autograd integration of ``kd_loss``: the one file in which eager mode, ``torch.func`` and ``torch.compile`` differ.

A kernel computes the loss and the gradient of the logits in one pass. The gradient is stored until the backward pass,
which multiplies it by the incoming factor. ``differentiable_loss`` picks the mechanism that stores it:

- eager mode: ``EagerKDLoss`` attaches a gradient to plain tensors. It bypasses the dispatcher, which costs more than
  the kernel at small sizes, and may scale the gradient in place. Under hooks for saved tensors (checkpointing,
  ``save_on_cpu``) it hands the gradient to them instead.
- ``torch.func``: ``FunctionalKDLoss``, since the transforms do not support custom operators with a gradient.
- ``torch.compile``, ``torch.export`` and dispatch modes: the custom operator ``kdfast::kd_loss``. Compiled code scales
  by PyTorch's multiplication, which the compiler can fuse and write over the stored gradient.

The loss can be differentiated once. The gradient is scaled by a function that raises when differentiated and has the
loss among its inputs, so second derivatives raise instead of being silently zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.errors import UsageError
from kdfast.ops import _torch_compat
from kdfast.ops.kd_loss.call import KDCall
from kdfast.ops.kd_loss.dispatch import run_kernel, run_terms, scale_rows
from kdfast.ops.kd_loss.reference import safe_reciprocal

__all__ = [
    "attach_gradient",
    "detached_terms",
    "differentiable_loss",
    "kd_loss_op",
    "scale_op",
    "values_are_readable",
]

LossAndGrad = tuple[Tensor, Tensor]
Result = tuple[Tensor, Tensor, str, float]
"""Loss, gradient of the logits, the backend that scales it, and the scale it is stored at."""


def differentiable_loss(call: KDCall, backend: str) -> Tensor:
    """Run a kernel and connect its loss with the logits.

    Raises:
        RuntimeError: If the logits have a forward-mode tangent.
    """
    logits = call.logits
    loss: Tensor
    if _torch_compat.has_tangent(logits):
        _raise_in_forward_mode()
    if torch.compiler.is_compiling():
        # Inside a compiled torch.func.vmap, a tensor does not expose whether it requires a gradient.
        need_grad = torch.is_grad_enabled() and (logits.requires_grad or _torch_compat.transforms_active())
        loss, _ = kd_loss_op(*call, backend, need_grad)
    elif _torch_compat.is_plain_eager(call.tensors):
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return run_kernel(backend, call, need_grad=False)[0]
        loss, grad = run_kernel(backend, call, need_grad=True)
        return attach_gradient(logits, (loss, grad, backend, call.grad_scale()))
    elif _torch_compat.transforms_active():
        # A wrapped tensor does not expose whether an outer transform differentiates it.
        loss, _ = FunctionalKDLoss.apply(*call, backend, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    else:
        loss, _ = kd_loss_op(*call, backend, torch.is_grad_enabled() and logits.requires_grad)
    return loss


def detached_terms(call: KDCall, backend: str) -> tuple[Tensor, Tensor]:
    """Run a kernel for the cross-entropy and the divergence of each row, (N,) each; no logits may need a gradient."""
    plain = not torch.compiler.is_compiling() and _torch_compat.is_plain_eager(call.tensors)
    if backend == "native" and call.soft_labels is None and plain:
        return run_terms(call)
    ce, kl = call.replace(alpha=0.0), call.replace(alpha=1.0, t_squared=False)
    return differentiable_loss(ce, backend), differentiable_loss(kl, backend)


def values_are_readable(call: KDCall) -> bool:
    """Whether values can be read without waiting for a device and without disturbing a trace or a transform."""
    on_cpu = call.logits.device.type == "cpu"
    return on_cpu and not torch.compiler.is_compiling() and _torch_compat.is_plain_eager(call.tensors)


# Eager mode.


class EagerKDLoss(torch.autograd.Function):
    """Connects a computed loss with plain logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, result: Result) -> Tensor:
        """Store the gradient: as an attribute, which ``save_for_backward`` would not allow to be scaled in place."""
        loss, *ctx.stored = result
        if _torch_compat.saved_tensors_are_hooked():
            ctx.save_for_backward(loss, ctx.stored[0])
            ctx.stored[0] = None
        else:
            ctx.save_for_backward(loss)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        """Scale the stored gradient: in place if no other backward pass can follow."""
        return EagerKDLoss._scaled(ctx, grad_loss), None

    @staticmethod
    def _scaled(ctx: Any, grad_loss: Tensor) -> Tensor:
        if ctx.stored is None:
            _ = ctx.saved_tensors  # raises PyTorch's own error about a graph that was freed
        stored, backend, grad_scale = ctx.stored
        hooked = stored is None
        grad: Tensor = stored
        if hooked:
            loss, grad = ctx.saved_tensors  # once only: checkpointing refuses to unpack a tensor again
        if torch.compiler.is_compiling():  # compiled autograd
            return _multiply(grad, grad_loss / grad_scale)
        if _is_grad_enabled():  # create_graph=True
            if not hooked:
                (loss,) = ctx.saved_tensors
            scaled: Tensor = FunctionalScale.apply(grad, grad_loss, loss, 1 / grad_scale, backend)  # type: ignore[no-untyped-call]
            return scaled
        is_last = not _torch_compat.backward_keeps_graph()
        if is_last:
            ctx.stored = None
        if _torch_compat.is_legacy_batched(grad_loss):  # is_grads_batched=True: several factors at once
            return _multiply(grad, grad_loss / grad_scale)
        is_owned = is_last and not hooked  # hooks may keep what they return
        if is_owned and backend == "native" and grad_loss.dim() == 0 and grad_loss.item() == grad_scale:
            return grad  # what scale_rows would return, without the calls that lead to it
        return scale_rows(backend, grad, grad_loss, 1 / grad_scale, in_place=is_owned)


_is_grad_enabled = torch.is_grad_enabled

attach_gradient: Callable[[Tensor, Result], Tensor] = _torch_compat.without_functorch_check(EagerKDLoss)
"""Connect a loss with the logits it was computed from; no transform may be active."""


# torch.compile and dispatch modes.

_TENSORS = (
    "Tensor logits, Tensor? labels, Tensor teacher, Tensor? rows, Tensor? classes, Tensor? tail, Tensor? weights, "
    "Tensor? alphas, Tensor? temperatures"
)
_NUMBERS = "float alpha, float temperature, bool t_squared, SymInt ignore_index, str reduction, bool reverse"
_DIVERGENCE = "str divergence, float first_weight, float second_weight, float label_smoothing"
_SCHEMA = f"({_TENSORS}, {_NUMBERS}, {_DIVERGENCE}, str backend, bool need_grad) -> (Tensor, Tensor)"


@torch.library.custom_op("kdfast::kd_loss", mutates_args=(), schema=_SCHEMA)
def kd_loss_op(*args: Any) -> LossAndGrad:
    """Loss and stored gradient. Arguments: the fields of ``KDCall``, "native" or "triton", and whether to store one."""
    *call, backend, need_grad = args
    return run_kernel(backend, KDCall(*call), need_grad)


@kd_loss_op.register_fake
def _(*args: Any) -> LossAndGrad:
    *fields, _, need_grad = args
    call = KDCall(*fields)
    return call.new_loss(), call.logits.new_empty(call.logits.shape if need_grad else (0,))


@torch.library.custom_op("kdfast::scale_rows", mutates_args=())
def scale_op(grad: Tensor, factor: Tensor, loss: Tensor, scale: float, backend: str) -> Tensor:
    """``grad * factor * scale`` in new memory; passing ``loss`` keeps the result attached to the graph."""
    return scale_rows(backend, grad, factor, scale, in_place=False)


@scale_op.register_fake
def _(grad: Tensor, factor: Tensor, loss: Tensor, scale: float, backend: str) -> Tensor:
    return torch.empty_like(grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: LossAndGrad) -> None:
    *fields, ctx.backend, ctx.need_grad = inputs
    ctx.scale = 1 / KDCall(*fields).grad_scale()
    loss, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.save_for_backward(grad, loss)


def _backward(scale: Callable[..., Tensor], ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.need_grad:
        raise UsageError("kdfast::kd_loss ran with need_grad=False and stored no gradient: call kdfast.kd_loss instead")
    grad, loss = ctx.saved_tensors
    if torch.compiler.is_compiling():
        grad = _multiply(grad, grad_loss * ctx.scale)
    else:
        grad = scale(grad, grad_loss, loss, ctx.scale, ctx.backend)
    return grad, *([None] * (len(KDCall._fields) + 1))


def _multiply(grad: Tensor, factor: Tensor) -> Tensor:
    """Compute ``scale_rows`` in plain PyTorch."""
    return (grad * factor.expand(grad.shape[:1]).unsqueeze(1)).to(grad.dtype)


def _raise_on_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("kd_loss can be differentiated only once: pass backend='reference' for second derivatives")


kd_loss_op.register_autograd(lambda ctx, g, _: _backward(scale_op, ctx, g), setup_context=_setup_context)
scale_op.register_autograd(_raise_on_second_derivative)
kd_loss_op.register_vmap(lambda info, in_dims, *args: _vmap(kd_loss_op, info, in_dims, *args))
scale_op.register_vmap(lambda info, in_dims, *args: _vmap_scale(scale_op, info, in_dims, *args))


# torch.func.


def _raise_in_forward_mode(ctx: Any = None, *_: Any) -> None:
    raise RuntimeError("kd_loss has no forward-mode derivative: pass backend='reference'")


class FunctionalKDLoss(torch.autograd.Function):
    """The operator for ``torch.func``: arguments and results of ``kd_loss_op``."""

    @staticmethod
    def forward(*args: Any) -> LossAndGrad:
        """Run the kernel."""
        *call, backend, need_grad = args
        return run_kernel(backend, KDCall(*call), need_grad)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradient."""
        return _backward(FunctionalScale.apply, ctx, grad_loss)

    jvp = staticmethod(_raise_in_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[LossAndGrad, Any]:
        """Compute all batches as rows of one call."""
        return _vmap(FunctionalKDLoss.apply, info, in_dims, *args)


class FunctionalScale(torch.autograd.Function):
    """``scale_op`` for ``torch.func``; has no derivative."""

    @staticmethod
    def forward(grad: Tensor, factor: Tensor, loss: Tensor, scale: float, backend: str) -> Tensor:
        """Scale into new memory."""
        return scale_rows(backend, grad, factor, scale, in_place=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Store nothing."""

    backward = jvp = staticmethod(_raise_on_second_derivative)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Scale all batches as rows of one call."""
        return _vmap_scale(FunctionalScale.apply, info, in_dims, *args)


def _vmap(
    run: Callable[..., LossAndGrad], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[LossAndGrad, Any]:
    """Compute all batches as rows of one call; means are computed afterwards, since each batch has its own divisor."""
    *fields, backend, need_grad = args
    call, size = KDCall(*fields), info.batch_size
    dims: Any = KDCall(*in_dims[:-2])  # type: ignore[arg-type]
    n, c = _batch_first(call.logits, dims.logits, size).shape[1:]
    flat = _flatten_batches(call, dims, size)
    loss, grad = run(*flat.replace(reduction="none"), backend, need_grad)
    loss, grad = loss.view(size, n), grad.view(size, n, c) if need_grad else grad.expand(size, 0)
    if call.reduction == "none":
        return (loss, grad), (0, 0)
    if call.reduction == "sum":
        return (loss.sum(1), grad), (0, 0)
    weights = loss.new_ones(size, n) if flat.weights is None else flat.weights.view(size, n).to(loss.dtype)
    if flat.hard_labels is not None:
        weights = torch.where(flat.hard_labels.view(size, n) != call.ignore_index, weights, 0)
    factor = safe_reciprocal(weights.sum(1))
    if need_grad:
        rescale = call.grad_scale() / call.replace(reduction="none").grad_scale()
        grad = (grad * (factor * rescale)[:, None, None]).to(grad.dtype)
    return (loss.sum(1) * factor, grad), (0, 0)


def _flatten_batches(call: KDCall, dims: Any, size: int) -> KDCall:
    """The call over all batches' rows: its tensors with the batch dimension flattened into the rows."""
    logits = _batch_first(call.logits, dims.logits, size)
    n, c = logits.shape[1:]
    rows = _batch_first(call.rows, dims.rows, size)
    if rows is None:
        rows = torch.arange(n, device=logits.device).expand(size, n)
    teacher: Any = call.teacher
    classes, tail = call.classes, call.tail
    if not (dims.teacher is dims.classes is dims.tail is None):
        m = _batch_first(teacher, dims.teacher, size).shape[1]
        # An out-of-range row must not index the next batch's teacher.
        offsets = torch.arange(size, device=logits.device).unsqueeze(1) * m
        rows = torch.where((rows < 0) | (rows >= m), -1, rows + offsets)
        teacher, classes, tail = (
            None if x is None else _batch_first(x, dim, size).flatten(0, 1)
            for x, dim in ((teacher, dims.teacher), (classes, dims.classes), (tail, dims.tail))
        )
    of_samples = {}
    for name in ("labels", "weights", "alphas", "temperatures"):
        x = _batch_first(getattr(call, name), getattr(dims, name), size)
        of_samples[name] = None if x is None else x.reshape(-1, *x.shape[2:])
    return call.replace(
        logits=logits.reshape(-1, c),
        teacher=teacher,
        rows=rows.reshape(-1),
        classes=classes,
        tail=tail,
        **of_samples,
    )


def _batch_first(x: Any, dim: Any, size: int) -> Any:
    """The tensor with its batch dimension first, repeated if it had none; None stays None."""
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _vmap_scale(run: Callable[..., Tensor], info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    grad, factor, loss = (_batch_first(args[i], in_dims[i], info.batch_size) for i in range(3))
    if factor.dim() == 1:
        factor = factor.unsqueeze(1).expand(grad.shape[:2])
    return run(grad.reshape(-1, grad.shape[-1]), factor.reshape(-1), loss, *args[3:]).view(grad.shape), 0
