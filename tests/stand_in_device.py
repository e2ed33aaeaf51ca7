"""A device for machines without one: its tensors compute on the CPU, but mix with tensors of the CPU as CUDA's do.

The stand-in has the device type "meta". An operation on both kinds of tensors fails, so do `numpy()` and other direct
reads of memory, and every read of a value counts, because on a GPU it waits for the device.
"""

from __future__ import annotations

import contextlib
import traceback
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
DEVICE = torch.device("meta")
COPIES = {aten.copy_.default, aten._to_copy.default}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}


class StandIn(torch.Tensor):
    """A tensor of the stand-in device; `held` has its values."""

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> StandIn:
        return torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, real: torch.Tensor) -> None:
        self.held = real

    def __repr__(self, **_: Any) -> str:
        return f"StandIn({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class StandInDevice(TorchDispatchMode):
    """Run operations on the stand-in device during the block.

    Attributes:
        reads: File and function of each read of a value or copy to the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> StandInDevice:
        # torch.tensor() creates its result below this mode, and autocast knows no such device.
        tensor, autocast = torch.tensor, torch.autocast

        def copy_tensor(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
            return tensor(*args, **options).to(device or "cpu")

        def autocast_on_cpu(kind: str, *args: Any, **options: Any) -> torch.autocast:
            return autocast("cpu" if kind == DEVICE.type else kind, *args, **options)

        self._patches.enter_context(mock.patch("torch.tensor", copy_tensor))
        self._patches.enter_context(mock.patch("torch.autocast", autocast_on_cpu))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        ours = any(isinstance(leaf, StandIn) for leaf in leaves)
        to_cpu = func in COPIES and str(kwargs.get("device")) == "cpu"
        if ours and (func in READS or to_cpu):
            frames = [f for f in traceback.extract_stack() if "/kdfast/" in f.filename]
            place = f"{frames[-1].filename.rpartition('/kdfast/')[2]}:{frames[-1].name}" if frames else "the test"
            self.reads.append(place)
        return run(func, args, kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, and wrap its results if it belongs to the stand-in device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, StandIn)]
    target = kwargs.get("device")
    if ours and func not in COPIES:
        strangers = [t for t in tensors if not isinstance(t, StandIn) and t.dim()]
        if strangers:
            raise RuntimeError(f"{func}: expected all tensors on one device, {tuple(strangers[0].shape)} is on the CPU")
    if target is not None and torch.device(target).type == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wrapped = torch.device(target).type == DEVICE.type if target is not None else bool(ours)
    if func is aten.copy_.default:
        wrapped = isinstance(args[0], StandIn)
    real_args, real_kwargs = tree_map_only(StandIn, lambda t: t.held, (args, kwargs))
    result = func(*real_args, **real_kwargs)
    if not wrapped:
        return result
    result = tree_map_only(torch.Tensor, lambda t: t if isinstance(t, StandIn) else StandIn(t), result)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours else result
