"""Calling a model without changing it: its inputs, their samples, and its buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops._torch_compat import wrapper_fault

__all__ = [
    "batched_tensors",
    "call_model",
    "check_inputs",
    "check_plain",
    "count_samples",
    "iter_tensors",
    "replace_tensors",
    "select_samples",
    "take_samples",
    "unchanged_buffers",
    "unwrap",
]

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and data parallelism: hooks and torch.func do not reach through them.

    Raises:
        UsageError: If the parameters are split over processes.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, _WRAPPERS):
        model = model.module
    split = [name for name, p in model.named_parameters() if any(c.__name__ == "DTensor" for c in type(p).__mro__)]
    split += [name for name, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"]
    if split:
        raise UsageError(
            f"{split[0]!r} is split over processes (fully_shard, FSDP or tensor parallelism): pass an ordinary model "
            "with the full weights, for example from torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "StateDictOptions(full_state_dict=True); a model in DistributedDataParallel works"
        )
    return model


def check_inputs(model: nn.Module, inputs: Any) -> None:
    """Raise unless the inputs are plain, finite tensors on the model's device.

    Raises:
        DataError: If an input is not finite.
        UsageError: If the inputs contain no tensor, or one on another device than the model or split over processes.
    """
    first = next(model.parameters(), None)
    tensors = list(iter_tensors(inputs))
    if not tensors:
        raise UsageError(
            f"`inputs` is a {type(inputs).__name__} without tensors: pass a tensor, or a tuple or dict with tensors"
        )
    for name, x in tensors:
        check_plain(name, x)
        if first is not None and x.device != first.device:
            raise UsageError(f"`{name}` is on {x.device}, the model on {first.device}: move one of them")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise DataError(f"`{name}` contains values that are not finite: remove or repair those samples")


def check_plain(name: str, x: object) -> None:
    """Raise a UsageError if a tensor holds its values in other tensors, as those split over processes do."""
    if fault := wrapper_fault(x):
        raise UsageError(f"`{name}` {fault}")


def count_samples(inputs: Any, labels: Any, dim: int) -> int:
    """Return the number of samples, after comparing labels and inputs.

    Args:
        inputs: As for ``kdfast.grad_norms``.
        labels: A tensor with one entry per sample, or anything else, which is not counted.
        dim: The dimension of the inputs that counts the samples.

    Raises:
        ShapeError: If no input has this dimension, or none has as many samples as there are labels.
    """
    tensors = [(name, x) for name, x in iter_tensors(inputs) if x.dim() > dim]
    if not tensors:
        name, x = next(iter_tensors(inputs))
        raise ShapeError(f"`{name}` has shape {tuple(x.shape)}, without dimension {dim}: pass the samples' `batch_dim`")
    name, x = tensors[0]
    n = x.shape[dim]
    if isinstance(labels, Tensor) and labels.dim() and not any(len(labels) == x.shape[dim] for _, x in tensors):
        there = [axis for axis, length in enumerate(x.shape) if length == len(labels)]
        hint = f"pass `batch_dim`={there[0]}" if there else "pass one label per sample"
        raise ShapeError(
            f"`labels` has {len(labels)} entries, and `{name}` of shape {tuple(x.shape)} has {n} samples in dimension "
            f"{dim}: {hint}"
        )
    return len(labels) if isinstance(labels, Tensor) and labels.dim() else n


def iter_tensors(inputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the inputs, each with its name for error messages."""
    if isinstance(inputs, Tensor):
        yield "inputs", inputs
    elif isinstance(inputs, Mapping):
        yield from ((f"inputs[{name!r}]", x) for name, x in inputs.items() if isinstance(x, Tensor))
    elif isinstance(inputs, (tuple, list)):
        yield from ((f"inputs[{i}]", x) for i, x in enumerate(inputs) if isinstance(x, Tensor))


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model: pass a mapping by keyword, a tuple or list by position, anything else as the only argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def batched_tensors(inputs: Any, n: int, dim: int = 0) -> tuple[list[Any], list[Tensor]]:
    """Return the inputs with `n` samples in a dimension: their keys (or positions) and the tensors."""
    if isinstance(inputs, Tensor):
        return [None], [inputs]
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    found = [(key, x) for key, x in items if isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == n]
    return [key for key, _ in found], [x for _, x in found]


def select_samples(inputs: Any, n: int, indices: list[int], dim: int = 0, first_only: bool = False) -> Any:
    """Return the inputs of some of the `n` samples; with ``first_only``, treat only the first input as batched."""
    keys, tensors = batched_tensors(inputs, n, dim)
    if first_only:
        keys, tensors = keys[:1], tensors[:1]
    return replace_tensors(inputs, keys, [take_samples(x, indices, dim) for x in tensors])


def take_samples(x: Tensor, indices: list[int], dim: int = 0) -> Tensor:
    """Return some samples of a tensor, with the indices on its device."""
    return x.index_select(dim, torch.tensor(indices, device=x.device))


def replace_tensors(inputs: Any, keys: list[Any], tensors: list[Tensor]) -> Any:
    """Return the inputs with the tensors at some keys replaced."""
    if isinstance(inputs, Tensor):
        return tensors[0]
    replaced = dict(zip(keys, tensors, strict=True))
    if isinstance(inputs, Mapping):
        return {**inputs, **replaced}
    return tuple(replaced.get(i, x) for i, x in enumerate(inputs))


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers that layers in training mode change, such as running statistics.

    Raises:
        UsageError: If a layer in eval mode changes a buffer.
    """
    buffers = [
        (layer, name, x, x.detach().clone() if layer.training else None, _version(x))
        for layer in model.modules()
        for name, x in layer.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, name, x, saved, _ in buffers:
                layer._buffers[name] = x
                # Normalization kernels do not count their changes in the version.
                if saved is not None and not torch.equal(x, saved):
                    x.copy_(saved)
    changed = [name for _, name, x, saved, version in buffers if saved is None and _version(x) != version]
    if changed:
        raise UsageError(
            f"buffer {changed[0]!r} is changed by a layer in eval mode: call model.train(), so that it is restored"
        )


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
