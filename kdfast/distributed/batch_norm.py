"""Batch norm over the batches of all processes, so that their network is that of one process but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["SynchronizedBatchNorms"]


class SynchronizedBatchNorms(TorchFunctionMode):
    """Context in which batch norms that take statistics of their batch take those of all processes' batches.

    It applies to whatever calls `torch.nn.functional.batch_norm`: PyTorch's modules, and those that libraries derive
    from them. Every process must call the same batch norms in the same order, and use the gradients' sum over the
    processes, which need not have equally many samples. Mean and variance are put together in float64.

    Args:
        compiled: Whether a network compiled by `torch.compile` runs inside, which then leaves batch norms out.
    """

    def __init__(self, *, compiled: bool = False) -> None:
        super().__init__()
        outside: Callable[..., Any] = torch.compiler.disable  # imports much, so that it is not a decorator
        self._batch_norm = outside(_batch_norm) if compiled else _batch_norm

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function; a batch norm over all processes."""
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Do what `torch.nn.functional.batch_norm` does, with the statistics of all processes' inputs."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    count, mean, var = _statistics(input.detach())
    if count < 2:
        raise ValueError(f"expected more than 1 value per channel in training, got {count} in all processes together")
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    dtype = torch.promote_types(input.dtype, torch.float32) if weight is None else weight.dtype
    weight = input.new_ones(input.shape[1], dtype=dtype) if weight is None else weight
    bias = torch.zeros_like(weight) if bias is None else bias
    result: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, mean.to(dtype), var.to(dtype), eps, count
    )
    return result


def _statistics(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return values per channel, and each channel's mean and biased variance, float64 (C,), over all processes."""
    dims = [0, *range(2, x.dim())]
    wide = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(wide, dims, correction=0)
    own = torch.cat([mean.double(), var.double(), mean.new_tensor([x.numel() // x.shape[1]], dtype=torch.float64)])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    both = torch.stack(parts)
    means, variances, counts = both[:, : len(mean)], both[:, len(mean) : -1], both[:, -1:]
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    return int(counts.sum()), mean, (shares * (variances + (means - mean).square())).sum(0)


class _Normalize(torch.autograd.Function):
    """Normalize with given statistics that depend on the inputs of all processes, which the gradient accounts for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, count: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count = eps, count
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, var = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # Of all processes, since the statistics depend on every input.
        sums = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(sums)
        of_weight, of_bias = sums / ctx.count
        scale = (var + ctx.eps).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        along_x = (weight * scale.square() * of_weight).view(shape)
        grad_x = grad_x - (weight * scale * of_bias).view(shape) - (x - mean.view(shape)) * along_x
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None
