"""The loop over chunks of rows: logits, loss and gradient of one chunk at a time.

The gradient of a chunk overwrites its logits, unless they are capped. Two matrix products then add it to the gradients
of hidden states and weights, so that no more than one chunk of logits exists at any time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops.huge_pages import new_large
from kdfast.ops.kd_loss.call import KDCall
from kdfast.ops.kd_loss.dispatch import run_kernel
from kdfast.ops.kd_loss.linear.call import Layer, LinearCall
from kdfast.ops.kd_loss.linear.shards import Shard, shard_losses, sum_over_group
from kdfast.ops.kd_loss.reference import reference_loss
from kdfast.ops.kd_loss.targets.forms import pick_rows

__all__ = ["Gradients", "Needs", "capped", "chain_cap", "compute", "layer_logits", "no_autocast"]

Needs = tuple[bool, bool, bool]
"""Whether hidden states, weights and bias need a gradient."""

_BLOCK_BYTES = 1 << 24
"""Largest temporary in the loops over blocks of a matrix."""


class Gradients(NamedTuple):
    """Gradients of hidden states, weights and bias, with their shapes and dtypes; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def compute(call: LinearCall, backend: str, needs: Needs, shard: Shard | None = None) -> tuple[Tensor, Gradients]:
    """Compute the loss and the gradients of its sum.

    Args:
        call: The checked call.
        backend: "native" or "triton", or "reference" for plain PyTorch within a chunk.
        needs: Which gradients to compute.
        shard: The classes of this process, if they are split over a group.

    Returns:
        The loss of ``call.new_loss`` and the gradients.
    """
    with torch.no_grad(), no_autocast(call.hidden.device.type):
        return _compute(call, backend, needs, shard)


def _compute(call: LinearCall, backend: str, needs: Needs, shard: Shard | None) -> tuple[Tensor, Gradients]:
    n, dtype = call.hidden.shape[0], call.dtype
    student = call.student._replace(weight=call.weight.to(dtype), bias=_cast(call.bias, dtype))
    teacher = call.teacher_layer
    rows = call.rows_per_chunk(needs[1])
    shape = (rows, call.weight.shape[0])
    buffer = new_large(student.weight, shape)
    # The derivative of the cap needs the logits beside their gradient.
    other = new_large(buffer, shape) if call.softcap > 0 and any(needs) else None
    of_teacher = None if teacher is None else new_large(teacher.weight, shape)
    losses = call.new_loss().new_empty(n)
    sums = _Sums(call, student.weight, needs, is_one=rows >= n)
    for begin in range(0, n, rows):
        end = min(begin + rows, n)
        x = call.hidden[begin:end].to(dtype)
        z = layer_logits(student, x, buffer[: end - begin])
        t = None
        if teacher is not None and of_teacher is not None:
            picked = call.teacher[begin:end] if call.rows is None else pick_rows(call.teacher, call.rows[begin:end])
            t = layer_logits(teacher, picked.to(teacher.weight.dtype), of_teacher[: end - begin])
        out = z if other is None else other[: end - begin]
        of_chunk = call.chunk_call(begin, end, z, t)
        if shard is None:
            losses[begin:end] = _run(of_chunk, backend, any(needs), out)
        else:
            losses[begin:end] = shard_losses(of_chunk, shard, out if any(needs) else None)
        if any(needs):
            if call.softcap > 0:
                chain_cap(out, z, call.softcap)
            sums.add(out, x, begin, end)
    grads = sums.result()
    if shard is not None and grads.hidden is not None:
        sum_over_group(shard, grads.hidden)
    return (losses if call.reduction == "none" else losses.sum()), grads


def no_autocast(device_type: str) -> Any:
    """Context manager that switches autocast off, on a device that has it."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def layer_logits(layer: Layer, x: Tensor, out: Tensor) -> Tensor:
    """Write a layer's logits of hidden states (n, H) to ``out`` (n, V), and return it."""
    w = layer.weight.t()
    if layer.bias is not None:
        torch.addmm(layer.bias, x, w, beta=layer.scale, alpha=layer.scale, out=out)
    elif layer.scale != 1:
        torch.addmm(out, x, w, beta=0, alpha=layer.scale, out=out)
    else:
        torch.mm(x, w, out=out)
    return capped(out, layer.softcap) if layer.softcap > 0 else out


def capped(z: Tensor, softcap: float) -> Tensor:
    """Replace logits by softcap tanh(z / softcap), rounded once, and return them."""
    for block in _row_blocks(z):
        wide = block.to(torch.promote_types(z.dtype, torch.float32))  # the block itself, unless in half precision
        wide.div_(softcap).tanh_().mul_(softcap)
        if wide is not block:
            block.copy_(wide)
    return z


def chain_cap(grad: Tensor, z: Tensor, softcap: float) -> None:
    """Multiply a gradient by 1 - (z / softcap)^2, the derivative of the cap at capped logits z; overwrites them."""
    for g, block in zip(_row_blocks(grad), _row_blocks(z), strict=True):
        slope = block.to(torch.promote_types(z.dtype, torch.float32))
        g.mul_(slope.div_(softcap).square_().neg_().add_(1))


def _row_blocks(x: Tensor) -> Iterator[Tensor]:
    """Blocks of rows, small enough for a CPU's cache; all rows on other devices."""
    size = x.shape[0] if x.device.type != "cpu" else max(1, 2**18 // max(1, x.shape[1]))
    return iter(torch.split(x, size)) if x.shape[0] > 0 else iter(())


def _run(call: KDCall, backend: str, need_grad: bool, out: Tensor) -> Tensor:
    """Compute the losses of a chunk, and write its gradient to ``out``."""
    if backend != "reference":
        return run_kernel(backend, call, need_grad, grad=out)[0]
    if not need_grad:
        return reference_loss(call)
    with torch.enable_grad():
        logits = call.logits.detach().requires_grad_()
        loss = reference_loss(call.replace(logits=logits))
        (grad,) = torch.autograd.grad(loss.sum(), logits)
    out.copy_(grad)
    return loss.detach()


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


class _Sums:
    """The gradients, to which each chunk is added.

    Those of weights and bias are summed in float32 or wider. In half precision, one chunk with all rows needs no sum.
    """

    def __init__(self, call: LinearCall, weight: Tensor, needs: Needs, *, is_one: bool) -> None:
        self.call, self.weight = call, weight
        wide = torch.promote_types(call.dtype, torch.float32)
        summed = call.dtype if is_one and call.weight.dtype == call.dtype else wide
        self.of_hidden = torch.empty_like(call.hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.of_weight = new_large(call.weight, call.weight.shape, summed) if needs[1] else None
        self.of_bias = call.weight.new_zeros(call.weight.shape[0], dtype=wide) if needs[2] else None

    def add(self, grad: Tensor, x: Tensor, begin: int, end: int) -> None:
        """Add the chunk of rows [begin, end): the gradient of its logits, and its hidden states."""
        scale = self.call.scale
        if self.of_hidden is not None:
            rows = self.of_hidden[begin:end]
            out = rows if rows.dtype == grad.dtype else torch.empty_like(x)
            torch.addmm(out, grad, self.weight, beta=0, alpha=scale, out=out)
            if out is not rows:
                rows.copy_(out)
        if self.of_weight is not None:
            self._add_weight(self.of_weight, grad, x, is_first=begin == 0)
        if self.of_bias is not None:
            self.of_bias.add_(grad.sum(0, dtype=self.of_bias.dtype), alpha=scale)

    def _add_weight(self, total: Tensor, grad: Tensor, x: Tensor, is_first: bool) -> None:
        scale = self.call.scale
        if total.dtype == grad.dtype:
            torch.addmm(total, grad.t(), x, beta=0 if is_first else 1, alpha=scale, out=total)
            return
        size = max(256, _BLOCK_BYTES // max(1, x.shape[1] * x.element_size()))
        for block, part in zip(torch.split(total, size), torch.split(grad, size, 1), strict=True):
            product = torch.mm(part.t(), x)
            block.copy_(product) if is_first else block.add_(product)
            # The scale of a half-precision product is applied to the sum, at the end.

    def result(self) -> Gradients:
        """Return the gradients in the dtypes of their tensors."""
        call, weight, bias = self.call, self.of_weight, self.of_bias
        if weight is not None:
            if call.hidden.shape[0] == 0:
                weight.zero_()
            elif weight.dtype != call.dtype and call.scale != 1:
                weight.mul_(call.scale)
            weight = weight.to(call.weight.dtype)
        if bias is not None and call.bias is not None:
            bias = bias.to(call.bias.dtype)
        return Gradients(self.of_hidden, weight, bias)
