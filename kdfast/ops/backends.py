"""Dispatch table: the implementations of each operator on each device, best first.

Rules:

- ``backend="auto"`` selects the first entry of the row that can run here. If that is not the first entry, one warning
  gives the reason, unless the dtype alone rules the others out: that is documented and equal on every machine.
- ``backend="name"`` selects that implementation or raises ``BackendUnavailable``; it never falls back.
- ``KDFAST_BACKEND`` replaces ``"auto"``: one name for all operators (``reference``), or ``operator=name`` pairs
  (``kd_loss=reference,views=native``). A name passed in code takes precedence.
- ``"reference"`` is plain PyTorch, runs everywhere, and is the oracle of the tests.
- With ``TRITON_INTERPRET=1``, a Triton kernel may be named for CPU tensors, for tests; "auto" never selects it.

A new operator adds one row per device to ``TABLE``, and one to ``DTYPES`` per backend that supports only some dtypes.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import NamedTuple

from kdfast.errors import BackendUnavailable, UsageError, unknown_name

__all__ = ["DTYPES", "TABLE", "Choice", "choices", "is_available", "resolve"]

TABLE: dict[tuple[str, str], tuple[str, ...]] = {
    ("kd_loss", "cpu"): ("native", "reference"),
    ("kd_loss", "cuda"): ("triton", "reference"),
    ("kd_loss_divergences", "cpu"): ("native", "reference"),
    ("kd_loss_divergences", "cuda"): ("triton", "reference"),
    ("kd_loss_options", "cpu"): ("native", "reference"),
    ("kd_loss_options", "cuda"): ("triton", "reference"),
    ("kd_loss_topk_options", "cpu"): ("native", "reference"),
    ("kd_loss_topk_options", "cuda"): ("reference",),
    ("views", "cpu"): ("native", "reference"),
    ("views", "cuda"): ("triton", "reference"),
    ("draws", "cpu"): ("native", "reference"),
    ("grad_norms", "cpu"): ("native", "reference"),
    ("grad_norms", "cuda"): ("cuda", "reference"),
    ("softmax_head", "cpu"): ("native", "reference"),
    ("softmax_head", "cuda"): ("cuda", "reference"),
}

DTYPES: dict[tuple[str, str], tuple[str, ...]] = {
    ("kd_loss", "native"): ("float32", "bfloat16", "float16"),
    ("kd_loss", "triton"): ("float32", "bfloat16", "float16"),
    ("kd_loss_divergences", "native"): ("float32", "bfloat16", "float16"),
    ("kd_loss_divergences", "triton"): ("float32", "bfloat16", "float16"),
    ("kd_loss_options", "native"): ("float32", "bfloat16", "float16"),
    ("kd_loss_options", "triton"): ("float32", "bfloat16", "float16"),
    ("kd_loss_topk_options", "native"): ("float32", "bfloat16", "float16"),
    ("views", "native"): ("float32", "bfloat16", "float16"),
    ("views", "triton"): ("float32", "bfloat16", "float16"),
    ("grad_norms", "native"): ("float32",),
    ("grad_norms", "cuda"): ("float32",),
    ("softmax_head", "native"): ("float32", "float64"),
    ("softmax_head", "cuda"): ("float32", "float64"),
}

# Earlier names of operators, accepted in ``KDFAST_BACKEND``.
_ALIASES = {"ghost": "grad_norms", "head": "softmax_head"}


class Choice(NamedTuple):
    """The backend selected for an operator on a device, and the reason."""

    op: str
    device: str
    backend: str
    reason: str


def resolve(op: str, device: str, dtype: str | None = None, backend: str = "auto") -> str:
    """Return the name of the implementation that runs ``op`` on tensors of ``device`` and ``dtype``.

    Args:
        op: Operator, the first half of a key of ``TABLE``.
        device: Device type, such as ``"cpu"`` or ``"cuda"``.
        dtype: Dtype without ``torch.``, such as ``"float32"``; None skips the dtype check.
        backend: ``"auto"`` or the name of an implementation.

    Raises:
        BackendUnavailable: If a named implementation does not exist for the operator and device, or cannot run.
        UsageError: If ``KDFAST_BACKEND`` names an unknown operator.
    """
    return _resolve(op, device, dtype, backend, os.environ.get("KDFAST_BACKEND", "")).backend


def choices() -> list[Choice]:
    """Return the choice for every row of the table, in table order, without warnings."""
    setting = os.environ.get("KDFAST_BACKEND", "")
    found = []
    for op, device in TABLE:
        try:
            named = _backend_from_environment(op, setting)
            found.append(_select(op, device, None, named or "auto", bool(named)))
        except (BackendUnavailable, UsageError) as error:
            found.append(Choice(op, device, "none", str(error)))
    return found


def is_available(op: str, device: str, backend: str) -> bool:
    """Return whether an implementation exists and can run here, regardless of ``KDFAST_BACKEND``."""
    return _problem(op, device, None, backend) is None


@functools.cache
def _resolve(op: str, device: str, dtype: str | None, backend: str, setting: str) -> Choice:
    named = _backend_from_environment(op, setting) if backend == "auto" else None
    choice = _select(op, device, dtype, named or backend, bool(named))
    row = TABLE.get((op, device), ("reference",))
    expected = next((name for name in row if _dtype_problem(op, name, dtype) is None), row[-1])
    if backend == "auto" and named is None and choice.backend != expected:
        warnings.warn(f"kdfast: {op} on {device} falls back to {choice.backend}: {choice.reason}", RuntimeWarning, 4)
    return choice


def _select(op: str, device: str, dtype: str | None, backend: str, from_environment: bool) -> Choice:
    row = TABLE.get((op, device), ("reference",))
    if backend != "auto":
        source = f"KDFAST_BACKEND={os.environ.get('KDFAST_BACKEND')}" if from_environment else f"backend={backend!r}"
        problem = _problem(op, device, dtype, backend)
        if problem:
            raise BackendUnavailable(
                f"{source}: {op} on {device} cannot use it: {problem}; choose one of {', '.join(row)}, or 'auto'"
            )
        return Choice(op, device, backend, f"requested by {source}")
    problems: list[str] = []
    for name in row:
        problem = _problem(op, device, dtype, name)
        if problem is None:
            return Choice(op, device, name, "; ".join(problems) or "preferred")
        problems.append(f"{name}: {problem}")
    raise BackendUnavailable(f"{op} on {device} has no implementation that can run: {'; '.join(problems)}")


def _backend_from_environment(op: str, setting: str) -> str | None:
    chosen = None
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        left, separator, right = entry.partition("=")
        left = _ALIASES.get(left, left)
        operators = sorted({name for name, _ in TABLE})
        if separator and left not in operators:
            raise unknown_name(f"KDFAST_BACKEND={setting!r}: no operator is named", left, operators)
        if not separator:
            chosen = entry if chosen is None else chosen
        elif left == op:
            chosen = right
    return None if chosen == "auto" else chosen


def _problem(op: str, device: str, dtype: str | None, backend: str) -> str | None:
    """Return why a backend cannot run, or None if it can."""
    row = TABLE.get((op, device), ("reference",))
    interpreted = backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend not in row and not (interpreted and "triton" in TABLE.get((op, "cuda"), ())):
        return "there is no such implementation"
    problem = _dtype_problem(op, backend, dtype)
    if problem is not None:
        return problem
    module = {"native": "kdfast._native", "cuda": "kdfast._native", "triton": "triton"}.get(backend)
    return None if module is None else _import_problem(module) or (_build_problem() if backend == "cuda" else None)


def _dtype_problem(op: str, backend: str, dtype: str | None) -> str | None:
    """Return why a backend does not support a dtype, or None if it does."""
    accepted = DTYPES.get((op, backend))
    if dtype is None or accepted is None or dtype in accepted:
        return None
    return f"it supports {', '.join(accepted)}, not {dtype}"


@functools.cache
def _import_problem(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"{module} cannot be imported ({error})"
    return None


def _build_problem() -> str | None:
    """Return why the extension has no CUDA kernels, or None if it has them."""
    if importlib.import_module("kdfast._native").cuda:
        return None
    return "kdfast was built without CUDA: install it where nvcc is on PATH"
