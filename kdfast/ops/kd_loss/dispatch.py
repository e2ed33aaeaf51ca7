"""From checked arguments of ``kd_loss`` to the kernel that was chosen."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdfast.errors import UsageError

__all__ = ["Operands", "Options", "hold_of", "kernels", "launch", "plain_eager", "scale_rows"]


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


def hold_of(dtype: torch.dtype, options: Options, weighted: bool) -> float:
    """Power of two that the stored gradient is multiplied by; 1 but for float16.

    The factor of ``torch.amp.GradScaler`` arrives only in the backward pass; a probability among many classes, or over
    the number of rows, would by then have been rounded to zero. A forward divergence's row has a gradient of at most
    1 + alpha T in magnitude, so 1024 times it stays finite up to T = 31. A reverse one grows with the spread of the
    logits, to alpha times a quarter of it, over T^2 where the loss is not multiplied by that: 4 times it stays finite
    for logits up to 1e4 on both sides. In a sum or without reduction, ``weighted`` rows have no bound at all.
    """
    if dtype != torch.float16 or (weighted and options.reduction != "mean"):
        return 1.0
    if max(options.temperature, 1 / options.temperature) > 31:
        return 1.0
    if options.reverse and options.alpha > 0:
        return 4.0 if options.t_squared or options.temperature >= 1 else 1.0
    return 1024.0


def launch(backend: str, operands: Operands, options: Options, need_grad: bool) -> tuple[Tensor, Tensor]:
    """Run a kernel: the loss and the stored gradient (empty unless ``need_grad``)."""
    hold = hold_of(operands.logits.dtype, options, operands.weights is not None)
    result: tuple[Tensor, Tensor] = kernels(backend).kd_loss(*operands, *options, hold, need_grad)
    return result


def scale_rows(backend: str, grad: Tensor, factor: Tensor, scale: float, in_place: bool) -> Tensor:
    """``grad * factor * scale``, see ``native.scale_rows``."""
    scaled: Tensor = kernels(backend).scale_rows(grad, factor, scale, in_place=in_place)
    return scaled


@functools.cache
def kernels(backend: str) -> Any:
    """The module of a backend, imported when it is first used."""
    if backend == "native":
        return importlib.import_module("kdfast.ops.native")
    if backend == "triton":
        return importlib.import_module("kdfast.ops.kd_loss.triton_launch")
    raise UsageError(f"backend={backend!r}: the operator runs 'native' or 'triton'")


def plain_eager(operands: Iterable[Tensor | None]) -> bool:
    """Whether a call may go around the dispatcher: no mode, transform, subclass or tangent is watching."""
    return (
        all(type(x) in _PLAIN for x in operands)
        and not _transforms_active()
        and _dispatch_modes() == 0
        and _tracing_state() is None
        and forward_ad._current_level < 0
    )


_PLAIN = (Tensor, torch.nn.Parameter, type(None))
# Looked up once: this runs at each call.
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
