"""Autograd integration of ``linear_kd_loss``.

- eager mode: ``EagerLinearKDLoss``. With ``memory="fast"`` the forward pass computes the gradients, and the backward
  pass scales them in place. With ``memory="low"`` the backward pass computes them from the inputs.
- ``torch.compile``, ``torch.export`` and dispatch modes: custom operators that do the same.

Float16 gradients, and those of a loss per row by which weights are trained, are always computed in the backward pass:
they need the incoming factor before they are rounded, or summed over rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _torch_compat
from kdfast.ops.kd_loss.dispatch import scale_rows
from kdfast.ops.kd_loss.linear.call import LinearCall
from kdfast.ops.kd_loss.linear.chunks import Gradients, Needs, compute
from kdfast.ops.kd_loss.linear.shards import Shard

__all__ = ["differentiable_loss", "linear_kd_loss_grads_op", "linear_kd_loss_op"]

_NO_NEEDS: Needs = (False, False, False)
_FIELDS = len(LinearCall._fields)


def differentiable_loss(call: LinearCall, backend: str, memory: str, shard: Shard | None = None) -> Tensor:
    """Compute the loss and connect it with hidden states, weights and bias.

    Args:
        call: The checked call.
        backend: "native", "triton" or "reference".
        memory: "fast" or "low".
        shard: The classes of this process, if they are split over a group; in eager mode only.

    Raises:
        RuntimeError: If a transform of ``torch.func`` or forward-mode differentiation is active.
    """
    if _torch_compat.transforms_active() or _torch_compat.in_dual_level():
        raise RuntimeError(
            "linear_kd_loss has no forward-mode derivative and no torch.func transforms: pass backend='reference'"
        )
    inputs = (call.hidden, call.weight, call.bias)
    of_hidden, of_weight, of_bias = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    needs = (of_hidden, of_weight, of_bias)
    late = memory == "low" or call.dtype == torch.float16 or (call.reduction == "none" and (of_weight or of_bias))
    plain = not torch.compiler.is_compiling() and _torch_compat.is_plain_eager(call.tensors)
    if plain and not any(needs):
        return compute(call, backend, _NO_NEEDS, shard)[0]
    if plain:
        loss: Tensor = EagerLinearKDLoss.apply(*call, backend, needs, late, shard)  # type: ignore[no-untyped-call]
        return loss
    loss, *_ = linear_kd_loss_op(*call, backend, *(_NO_NEEDS if late else needs), *needs)
    return loss


class EagerLinearKDLoss(torch.autograd.Function):
    """The loss in eager mode; arguments: those of ``LinearCall``, backend, needs, whether it computes late, shard."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Compute the loss, and unless late the gradients."""
        *fields, ctx.backend, ctx.needs, ctx.late, ctx.shard = args
        call = LinearCall(*fields)
        loss, grads = compute(call, ctx.backend, _NO_NEEDS if ctx.late else ctx.needs, ctx.shard)
        ctx.stored = None
        if ctx.late:
            ctx.numbers = call[len(call.tensors) :]
            ctx.save_for_backward(loss, *call.tensors)
        elif _torch_compat.saved_tensors_are_hooked():
            ctx.save_for_backward(loss, *grads)
        else:
            # Not saved, since a saved tensor must not be scaled in place.
            ctx.stored = grads
            ctx.save_for_backward(loss)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale or compute the gradients."""
        loss, *saved = ctx.saved_tensors  # raises PyTorch's own error if the graph was freed
        if ctx.late:
            if _torch_compat.is_legacy_batched(grad_loss):
                raise RuntimeError(
                    "linear_kd_loss computes these gradients in the backward pass, which cannot take "
                    "is_grads_batched=True: pass backend='reference'"
                )
            call = LinearCall(*saved, *ctx.numbers)
            grads = compute(call.with_factors(call.factors * grad_loss), ctx.backend, ctx.needs, ctx.shard)[1]
        else:
            hooked = ctx.stored is None
            grads = Gradients(*saved) if hooked else ctx.stored
            is_last = not _torch_compat.backward_keeps_graph()
            if is_last and not hooked:
                ctx.stored = ()
            grads = _scaled(grads, grad_loss, ctx.backend, in_place=is_last and not hooked)
        if torch.is_grad_enabled():  # create_graph=True
            once = (None if x is None else _Once.apply(x, grad_loss, loss) for x in grads)  # type: ignore[no-untyped-call]
            grads = Gradients(*once)
        return *grads, *([None] * (_FIELDS + 1))


class _Once(torch.autograd.Function):
    """A gradient, attached to the graph so that its derivative raises instead of being zero."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, grad_loss: Tensor, loss: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "linear_kd_loss can be differentiated only once: pass backend='reference' for second derivatives"
        )


def _scaled(grads: Gradients, factor: Tensor, backend: str, *, in_place: bool) -> Gradients:
    if backend == "reference" or torch.compiler.is_compiling() or _torch_compat.is_legacy_batched(factor):
        return Gradients(*(None if x is None else _multiply(x, factor) for x in grads))
    scaled = []
    for x in grads:
        if x is not None:
            matrix = x.unsqueeze(0) if x.dim() == 1 else x
            x = scale_rows(backend, matrix, factor, 1.0, in_place=in_place).view(x.shape)
        scaled.append(x)
    return Gradients(*scaled)


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Return ``x`` times a factor that is a scalar or has one entry per row."""
    return (x * (factor.unsqueeze(-1) if factor.dim() == 1 else factor)).to(x.dtype)


# torch.compile and dispatch modes.

_SCHEMA_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels, Tensor teacher, Tensor? rows, Tensor? classes, "
    "Tensor? tail, Tensor factors, Tensor? alphas, Tensor? temperatures, Tensor? teacher_weight, Tensor? teacher_bias"
)
_SCHEMA_NUMBERS = (
    "float alpha, float temperature, bool t_squared, SymInt ignore_index, str reduction, bool reverse, str divergence, "
    "float first_weight, float second_weight, float label_smoothing, float softcap, float scale, "
    "float teacher_softcap, float teacher_scale, bool has_probs, SymInt chunk, ScalarType dtype, str backend"
)
_SCHEMA_NEEDS = "bool of_hidden, bool of_weight, bool of_bias"
_LATE_NEEDS = "bool late_hidden, bool late_weight, bool late_bias"


@torch.library.custom_op(
    "kdfast::linear_kd_loss",
    mutates_args=(),
    schema=f"({_SCHEMA_TENSORS}, {_SCHEMA_NUMBERS}, {_SCHEMA_NEEDS}, {_LATE_NEEDS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def linear_kd_loss_op(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients of hidden states, weights and bias, empty where not needed.

    Arguments: the fields of ``LinearCall``, the backend, which gradients to compute now, and which a backward pass
    needs.
    """
    fields, backend, needs = args[:_FIELDS], args[_FIELDS], args[_FIELDS + 1 : _FIELDS + 4]
    call = LinearCall(*fields)
    loss, grads = compute(call, backend, needs)
    return loss, *_dense(call, grads)


@torch.library.custom_op(
    "kdfast::linear_kd_loss_grads",
    mutates_args=(),
    schema=f"({_SCHEMA_TENSORS}, {_SCHEMA_NUMBERS}, {_SCHEMA_NEEDS}, Tensor loss) -> (Tensor, Tensor, Tensor)",
)
def linear_kd_loss_grads_op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weights and bias; passing ``loss`` keeps the results attached to the graph."""
    call = LinearCall(*args[:_FIELDS])
    return _dense(call, compute(call, args[_FIELDS], args[_FIELDS + 1 : _FIELDS + 4])[1])


@linear_kd_loss_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    call = LinearCall(*args[:_FIELDS])
    return call.new_loss(), *_new_gradients(call, args[_FIELDS + 1 : _FIELDS + 4])


@linear_kd_loss_grads_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return _new_gradients(LinearCall(*args[:_FIELDS]), args[_FIELDS + 1 : _FIELDS + 4])


def _dense(call: LinearCall, grads: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    of_hidden, of_weight, of_bias = (call.hidden.new_empty(0) if x is None else x for x in grads)
    return of_hidden, of_weight, of_bias


def _new_gradients(call: LinearCall, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    inputs = (call.hidden, call.weight, call.bias)
    return tuple(
        x.new_empty(x.shape) if need and x is not None else call.hidden.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = LinearCall(*inputs[:_FIELDS])
    ctx.backend, ctx.now, ctx.needs = inputs[_FIELDS], inputs[_FIELDS + 1 : _FIELDS + 4], inputs[_FIELDS + 4 :]
    ctx.numbers = call[len(call.tensors) :]
    loss, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.save_for_backward(loss, *(grads if any(ctx.now) else call.tensors))


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    loss, *saved = ctx.saved_tensors
    if any(ctx.now):
        grads = [_multiply(x, grad_loss) if need else None for x, need in zip(saved, ctx.needs, strict=True)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = [None if x is None else _Once.apply(x, grad_loss, loss) for x in grads]  # type: ignore[no-untyped-call]
    else:
        call = LinearCall(*saved, *ctx.numbers)
        call = call.with_factors(call.factors * grad_loss)
        late = linear_kd_loss_grads_op(*call, ctx.backend, *ctx.needs, loss)
        grads = [x if need else None for x, need in zip(late, ctx.needs, strict=True)]
    return *grads, *([None] * (_FIELDS + 4))


def _raise_on_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "linear_kd_loss can be differentiated only once: pass backend='reference' for second derivatives"
    )


linear_kd_loss_op.register_autograd(_backward, setup_context=_setup_context)
linear_kd_loss_grads_op.register_autograd(_raise_on_second_derivative)
