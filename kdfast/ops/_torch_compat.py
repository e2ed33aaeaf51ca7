"""Private PyTorch names that kdfast depends on, all in one file.

Each name was checked by the tests on torch 2.8.0, 2.13.0 and 2.14.1. When a PyTorch release drops one, mend it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "assume_constant_result",
    "backward_keeps_graph",
    "dispatch_mode_count",
    "has_tangent",
    "in_dual_level",
    "is_legacy_batched",
    "is_plain_eager",
    "no_dispatch_modes",
    "no_torch_function",
    "saved_tensors_are_hooked",
    "storage_use_count",
    "tracing_state",
    "transforms_active",
    "without_functorch_check",
    "wrapper_fault",
]

F = TypeVar("F", bound=Callable[..., Any])

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a ``torch.func`` transform is active."""

dispatch_mode_count: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""Number of active ``TorchDispatchMode``s."""

tracing_state: Callable[[], object] = torch._C._get_tracing_state
"""State of ``torch.jit.trace``, or None."""

is_legacy_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor is a batch made by ``torch.autograd.grad(is_grads_batched=True)``."""

backward_keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
"""Whether the running backward pass was called with ``retain_graph=True``."""

no_dispatch_modes: Callable[[], Any] = torch._C._DisableTorchDispatch
"""Context manager that hides tensors from dispatch modes, such as fake-tensor mode."""

no_torch_function: Callable[[], Any] = torch._C.DisableTorchFunction
"""Context manager that hides operations from function modes."""

_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_use_count = getattr(torch._C, "_storage_Use_Count", None)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, type(None))


def is_plain_eager(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call may bypass the dispatcher: no mode, transform, trace, tensor subclass or dual level is active."""
    return (
        all(type(x) in _PLAIN_TYPES for x in tensors)
        and not transforms_active()
        and dispatch_mode_count() == 0
        and tracing_state() is None
        and forward_ad._current_level < 0
    )


def wrapper_fault(x: object) -> str | None:
    """Return why kernels cannot read a tensor that holds its values in other tensors; None for all others."""
    wrapper = bool(is_traceable_wrapper_subclass(x))  # no type guard
    if not wrapper:
        return None
    kind = type(x).__name__
    if kind == "DTensor":
        return "is a DTensor, split over processes: pass its .full_tensor(), or the rows of this process by .to_local()"
    return f"is a {kind}, which holds its values in other tensors: pass a plain tensor"


def in_dual_level() -> bool:
    """Whether a ``torch.autograd.forward_ad.dual_level`` is active."""
    return forward_ad._current_level >= 0


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation is tracking a tensor."""
    return in_dual_level() and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def saved_tensors_are_hooked() -> bool:
    """Whether hooks for saved tensors are active, as in checkpointing; True if this PyTorch does not tell."""
    return _saved_tensors_hooks is None or _saved_tensors_hooks(False) is not None


def storage_use_count(storage: UntypedStorage) -> int:
    """Number of C++ references to a storage; 0 if this PyTorch does not expose it."""
    return 0 if _use_count is None else int(_use_count(storage._cdata))


def assume_constant_result(function: F) -> F:
    """Let ``torch.compile`` call a function while tracing and treat its result as a constant.

    ``torch.compiler.assume_constant_result`` does the same but imports ``torch._dynamo``, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def without_functorch_check(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its search for ``torch.func`` transforms; the caller has made sure there are none."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply
