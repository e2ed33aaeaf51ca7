"""How PyTorch sees ``kdfast.kd_loss``: an opaque custom op, and autograd functions for eager mode and ``torch.func``.

The forward kernel writes the losses and the gradient together; the gradient waits for the backward pass, which
multiplies it by the incoming factor, or hands it on as it is when that factor is one. Three ways lead to the kernels:

- ``tie_to_logits`` for plain tensors in eager mode: it goes around the dispatcher, whose cost exceeds the kernel's at
  small sizes, and may scale the gradient in place;
- ``FunctionalKDLoss`` under the transforms of ``torch.func``, which custom ops with a gradient do not support;
- ``torch.ops.kdfast.kd_loss`` for ``torch.compile``, ``torch.export`` and other dispatch modes. What is compiled scales
  by PyTorch's own multiplication: the compiler fuses it with its neighbours and lets it write over the stored gradient.

The loss can be differentiated once. The scaling in the backward pass is therefore a function of the loss as well, so
that a second derivative meets it and raises; otherwise it would be zero without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.errors import UsageError
from kdfast.ops.kd_loss.dispatch import Operands, Options, hold_of, launch, scale_rows
from kdfast.ops.kd_loss.reference import inverse_of

__all__ = ["FunctionalKDLoss", "kd_loss_op", "scale_op", "tie_to_logits"]

Result = tuple[Tensor, Tensor]
Kept = tuple[Tensor, str, float]
"""Gradient, the backend that scales it, and the power of two that it is held by."""


@torch.library.custom_op("kdfast::kd_loss", mutates_args=())
def kd_loss_op(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor,
    rows: Tensor | None,
    classes: Tensor | None,
    tail: Tensor | None,
    weights: Tensor | None,
    alpha: float,
    temperature: float,
    t_squared: bool,
    ignore_index: int,
    reduction: str,
    reverse: bool,
    backend: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and stored gradient; ``backend`` is "native" or "triton"."""
    operands = Operands(logits, labels, teacher, rows, classes, tail, weights)
    options = Options(alpha, temperature, t_squared, ignore_index, reduction, reverse)
    return launch(backend, operands, options, need_grad)


@kd_loss_op.register_fake
def _(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor,
    rows: Tensor | None,
    classes: Tensor | None,
    tail: Tensor | None,
    weights: Tensor | None,
    alpha: float,
    temperature: float,
    t_squared: bool,
    ignore_index: int,
    reduction: str,
    reverse: bool,
    backend: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[:1] if reduction == "none" else (), dtype=torch.float32)
    return loss, logits.new_empty(logits.shape if need_grad else (0,))


@torch.library.custom_op("kdfast::scale_rows", mutates_args=())
def scale_op(grad: Tensor, factor: Tensor, loss: Tensor, scale: float, backend: str) -> Tensor:
    """``grad * factor * scale`` in new memory; ``loss`` only ties the result to what it is the gradient of."""
    return scale_rows(backend, grad, factor, scale, in_place=False)


@scale_op.register_fake
def _(grad: Tensor, factor: Tensor, loss: Tensor, scale: float, backend: str) -> Tensor:
    return torch.empty_like(grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    loss, grad = output
    ctx.backend, ctx.need_grad = inputs[13], inputs[14]
    ctx.scale = 1 / hold_of(inputs[0].dtype, Options(*inputs[7:13]), inputs[6] is not None)
    ctx.mark_non_differentiable(grad)
    ctx.save_for_backward(grad, loss)


def _backward(scale: Callable[..., Tensor], ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.need_grad:
        raise UsageError("kdfast::kd_loss ran with need_grad=False and kept no gradient: call kdfast.kd_loss instead")
    grad, loss = ctx.saved_tensors
    if torch.compiler.is_compiling():  # nothing can be differentiated twice there
        return (_times(grad, grad_loss * ctx.scale), *([None] * 14))
    return (scale(grad, grad_loss, loss, ctx.scale, ctx.backend), *([None] * 14))


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """What ``scale_rows`` computes, in PyTorch."""
    return (grad * factor.expand(grad.shape[:1]).unsqueeze(1)).to(grad.dtype)


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("kd_loss can be differentiated once: for a second derivative, pass backend='reference'")


kd_loss_op.register_autograd(lambda ctx, g, _: _backward(scale_op, ctx, g), setup_context=_setup_context)
scale_op.register_autograd(_refuse)


def _batched(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The tensor with its batch dimension first, repeated where it had none."""
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _vmap(call: Callable[..., Result], info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Result, Any]:
    """All batches as rows of one call; a mean is taken outside, since each batch divides by its own mass."""
    size, options = info.batch_size, Options(*args[7:13])
    backend, need_grad = args[13:]
    logits, labels, rows, weights = (_batched(args[i], in_dims[i], size) for i in (0, 1, 3, 6))
    assert logits is not None
    n, c = logits.shape[1:]
    if rows is None:
        rows = torch.arange(n, device=logits.device).expand(size, n)
    sources = [args[i] for i in (2, 4, 5)]
    if any(in_dims[i] is not None for i in (2, 4, 5)):
        first = torch.arange(size, device=logits.device).unsqueeze(1)
        stacked = [_batched(args[i], in_dims[i], size) for i in (2, 4, 5)]
        m = stacked[0].shape[1]  # type: ignore[union-attr]
        # A row that its own teacher does not have must not be found in the next one.
        rows = torch.where((rows < 0) | (rows >= m), -1, rows + first * m)
        sources = [None if x is None else x.reshape(-1, *x.shape[2:]) for x in stacked]
    teacher, classes, tail = sources
    flat = [None if x is None else x.reshape(-1) for x in (labels, rows, weights)]
    operands = Operands(logits.reshape(-1, c), flat[0], teacher, flat[1], classes, tail, flat[2])
    loss, grad = call(*operands, *options._replace(reduction="none"), backend, need_grad)
    loss, grad = loss.view(size, n), grad.view(size, n, c) if need_grad else grad.expand(size, 0)
    if options.reduction == "mean":
        mass = loss.new_ones(size, n) if weights is None else weights.to(loss.dtype)
        inverse = inverse_of((mass if labels is None else torch.where(labels != options.ignore_index, mass, 0)).sum(1))
        loss = loss.sum(1) * inverse
        if need_grad:
            held = [hold_of(grad.dtype, x, weights is not None) for x in (options, options._replace(reduction="none"))]
            grad = (grad * (inverse * held[0] / held[1])[:, None, None]).to(logits.dtype)
    elif options.reduction == "sum":
        loss = loss.sum(1)
    return (loss, grad), (0, 0)


def _vmap_scale(call: Callable[..., Tensor], info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    grad, factor, loss = (_batched(args[i], in_dims[i], info.batch_size) for i in range(3))
    assert grad is not None
    assert factor is not None
    if factor.dim() == 1:
        factor = factor.unsqueeze(1).expand(grad.shape[:2])
    return call(grad.reshape(-1, grad.shape[-1]), factor.reshape(-1), loss, *args[3:]).view(grad.shape), 0


kd_loss_op.register_vmap(lambda info, in_dims, *args: _vmap(kd_loss_op, info, in_dims, *args))
scale_op.register_vmap(lambda info, in_dims, *args: _vmap_scale(scale_op, info, in_dims, *args))


class FunctionalKDLoss(torch.autograd.Function):
    """The operator for ``torch.func``: the arguments of ``kd_loss_op``, its loss and its gradient."""

    @staticmethod
    def forward(*args: Any) -> Result:
        """Run the kernel."""
        return launch(args[13], Operands(*args[:7]), Options(*args[7:13]), args[14])

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the kept gradient."""
        return _backward(FunctionalScale.apply, ctx, grad_loss)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Result, Any]:
        """All batches as rows of one call."""
        return _vmap(FunctionalKDLoss.apply, info, in_dims, *args)


class FunctionalScale(torch.autograd.Function):
    """``scale_op`` for ``torch.func``; has no derivative."""

    @staticmethod
    def forward(grad: Tensor, factor: Tensor, loss: Tensor, scale: float, backend: str) -> Tensor:
        """Run the kernel, into new memory."""
        return scale_rows(backend, grad, factor, scale, in_place=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    backward = staticmethod(_refuse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """All batches as rows of one call."""
        return _vmap_scale(FunctionalScale.apply, info, in_dims, *args)


class EagerKDLoss(torch.autograd.Function):
    """Ties a loss that is computed already to plain logits in eager mode."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, result: tuple[Tensor, Kept]) -> Tensor:
        """Keep the gradient: as an attribute, since saving a tensor and asking for it costs a tenth of a small call."""
        loss, ctx.kept = result
        ctx.save_for_backward(loss)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        """Scale the kept gradient: in its own memory when this is the only backward pass through the graph."""
        kept = ctx.kept
        if kept is not None and torch.compiler.is_compiling():  # by compiled autograd
            return _times(kept[0], grad_loss / kept[2]), None
        if kept is None or _is_grad_enabled():  # the latter is create_graph=True
            (loss,) = ctx.saved_tensors  # raises in a second pass through a graph that was not retained
            grad, backend, hold = kept
            return FunctionalScale.apply(grad, grad_loss, loss, 1 / hold, backend), None  # type: ignore[no-untyped-call]
        last = not _keeps_graph()
        if last:
            ctx.kept = None
        grad, backend, hold = kept
        if _is_batch(grad_loss):  # is_grads_batched=True: several factors at once
            return _times(grad, grad_loss / hold), None
        if last and backend == "native" and grad_loss.dim() == 0 and grad_loss.item() == hold:
            return grad, None  # as scale_rows would, without the calls on the way to it
        return scale_rows(backend, grad, grad_loss, 1 / hold, last), None


_is_grad_enabled = torch.is_grad_enabled
_is_batch = torch._C._functorch.is_legacy_batchedtensor
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
# Without the wrapper that looks for transforms of torch.func: callers have made sure that there are none.
tie_to_logits: Callable[[Tensor, tuple[Tensor, Kept]], Tensor] = super(torch.autograd.Function, EagerKDLoss).apply
