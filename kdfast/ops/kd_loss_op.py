"""The operator behind ``kdfast.kd_loss``: one opaque custom op, its gradient, and a shorter way in eager mode.

The forward kernel writes the losses and the gradient together; the gradient waits for the backward pass, which
multiplies it by the incoming factor, or hands it on as it is when that factor is one. Two ways lead to the kernels:

- ``torch.ops.kdfast.kd_loss``, for ``torch.compile``, ``torch.func`` and other dispatch modes. Its backward calls a
  second op that has no derivative, so that differentiating twice raises.
- ``EagerKDLoss``, for plain tensors in eager mode: it skips the dispatcher, whose cost exceeds the kernel's at small
  sizes, and may scale the gradient in place.

float16 gradients of a mean wait multiplied by ``hold_of(...)``: the factor of ``torch.amp.GradScaler`` arrives only in
the backward pass, and a probability over the number of rows would by then have been rounded to zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdfast.errors import UsageError

__all__ = ["EagerKDLoss", "Operands", "Options", "hold_of", "kd_loss_op", "launch", "plain_eager", "scale_op"]


class Operands(NamedTuple):
    """The tensors of one call; shapes as in ``kdfast.kd_loss``."""

    logits: Tensor
    labels: Tensor | None
    teacher: Tensor
    rows: Tensor | None
    classes: Tensor | None
    tail: Tensor | None
    weights: Tensor | None


class Options(NamedTuple):
    """The numbers of one call."""

    alpha: float
    temperature: float
    t_squared: bool
    ignore_index: int
    reduction: str
    reverse: bool


def hold_of(dtype: torch.dtype, options: Options) -> float:
    """Power of two that the stored gradient is multiplied by: 1024 for the mean in float16, else 1.

    The gradient of a mean is at most 1 + alpha T in magnitude, so 1024 times it stays finite up to T = 31.
    """
    extreme = max(options.temperature, 1 / options.temperature) > 31
    return 1024.0 if dtype == torch.float16 and options.reduction == "mean" and not extreme else 1.0


def launch(backend: str, operands: Operands, options: Options, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Run a kernel: the loss and the stored gradient (empty unless ``need_grad``)."""
    hold = hold_of(operands.logits.dtype, options)
    if backend == "native":
        from kdfast.ops import native

        return native.kd_loss(*operands, *options, hold, need_grad)
    if backend == "triton":
        from kdfast.ops import kd_loss_triton

        return kd_loss_triton.kd_loss(*operands, *options, hold, need_grad)
    raise UsageError(f"backend={backend!r}: the operator runs 'native' or 'triton'")


def _scale(backend: str, grad: Tensor, factor: Tensor, scale: float, in_place: bool) -> Tensor:
    if backend == "native":
        from kdfast.ops import native

        return native.scale_rows(grad, factor, scale, in_place=in_place)
    from kdfast.ops import kd_loss_triton

    return kd_loss_triton.scale_rows(grad, factor, scale, in_place=in_place)


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
def scale_op(grad: Tensor, factor: Tensor, scale: float, backend: str) -> Tensor:
    """``grad * factor * scale`` in new memory. Without a derivative: differentiating the loss twice must raise."""
    return _scale(backend, grad, factor, scale, in_place=False)


@scale_op.register_fake
def _(grad: Tensor, factor: Tensor, scale: float, backend: str) -> Tensor:
    return torch.empty_like(grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend, ctx.need_grad = inputs[13], inputs[14]
    ctx.scale = 1 / hold_of(inputs[0].dtype, Options(*inputs[7:13]))
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.need_grad:
        raise UsageError("kdfast::kd_loss ran with need_grad=False and kept no gradient: call kdfast.kd_loss instead")
    (grad,) = ctx.saved_tensors
    return (scale_op(grad, grad_loss, ctx.scale, ctx.backend), *([None] * 14))


kd_loss_op.register_autograd(_backward, setup_context=_setup_context)


def _batched(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The tensor with its batch dimension first, repeated where it had none."""
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


@kd_loss_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
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
        rows = rows + first * stacked[0].shape[1]  # type: ignore[union-attr]
        sources = [None if x is None else x.reshape(-1, *x.shape[2:]) for x in stacked]
    teacher, classes, tail = sources
    flat = [None if x is None else x.reshape(-1) for x in (labels, rows, weights)]
    operands = Operands(logits.reshape(-1, c), flat[0], teacher, flat[1], classes, tail, flat[2])
    loss, grad = kd_loss_op(*operands, *options._replace(reduction="none"), backend, need_grad)
    loss, grad = loss.view(size, n), grad.view(size, n, c) if need_grad else grad.expand(size, 0)
    if options.reduction == "mean":
        mass = loss.new_ones(size, n) if weights is None else weights.to(loss.dtype)
        mass = (mass if labels is None else mass * (labels != options.ignore_index)).sum(1)
        inverse = torch.where(mass == 0, 0, 1 / mass)
        loss = loss.sum(1) * inverse
        if need_grad:
            grad = (grad * (inverse * hold_of(grad.dtype, options))[:, None, None]).to(logits.dtype)
    elif options.reduction == "sum":
        loss = loss.sum(1)
    return (loss, grad), (0, 0)


@scale_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], grad: Tensor, factor: Tensor, scale: float, backend: str) -> Any:
    batches, factors = _batched(grad, in_dims[0], info.batch_size), _batched(factor, in_dims[1], info.batch_size)
    assert batches is not None
    assert factors is not None
    if factors.dim() == 1:
        factors = factors.unsqueeze(1).expand(batches.shape[:2])
    flat = batches.reshape(-1, batches.shape[-1])
    return scale_op(flat, factors.reshape(-1), scale, backend).view(batches.shape), 0


def plain_eager(tensor: Tensor) -> bool:
    """Whether a call on this tensor may go around the dispatcher: no mode, transform or subclass is watching."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


class EagerKDLoss(torch.autograd.Function):
    """Loss of plain tensors; see the module's text."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, backend: str, operands: Operands, options: Options) -> Tensor:
        """Run the kernel and keep the gradient."""
        loss, grad = launch(backend, operands._replace(logits=logits), options, need_grad=True)
        ctx.backend = backend
        ctx.scale = 1 / hold_of(logits.dtype, options)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the kept gradient: in its own memory when this is the only backward pass through the graph."""
        (grad,) = ctx.saved_tensors
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        return _scale(ctx.backend, grad, grad_loss, ctx.scale, in_place), None, None, None
