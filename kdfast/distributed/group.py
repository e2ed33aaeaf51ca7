"""This process among those of a command: `torchrun --nproc-per-node 2 -m kdfast distill ...`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from kdfast.distributed.ending import is_connection_error, is_first_to_end, notice_lost_process
from kdfast.errors import UsageError

# On a CPU the main process alone may evaluate for hours; one that ends is noticed at once.
_PATIENT = timedelta(days=30)
_GLOO_CLEANUP_SECONDS = 0.1


@dataclass(frozen=True)
class Distributed:
    """This process among the processes of a command; the default is a single process.

    Attributes:
        rank: Index of this process, from 0; process 0 writes the results.
        world_size: Number of processes.
        local_rank: Index of this process on its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Distributed:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, as set by torchrun; one process if WORLD_SIZE is not set.

        Raises:
            UsageError: If they are not three integers.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, world_size, local_rank = (int(os.environ[name]) for name in names)
        except (KeyError, ValueError) as error:
            values = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
            raise UsageError(f"{values}: all three must be integers; start with torchrun or unset them") from error
        return cls(rank, world_size, local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def local_device(self, device: torch.device) -> torch.device:
        """Return this process's own device: `cuda` becomes the CUDA device of its local rank.

        Raises:
            UsageError: If this machine has fewer CUDA devices than processes, or several processes name one device.
        """
        if self.world_size == 1 or device.type != "cuda":
            return device
        if str(device) != "cuda":
            raise UsageError(
                f"`device` is {device} for {self.world_size} processes: pass cuda, so that each uses its own device"
            )
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UsageError(
                f"LOCAL_RANK is {self.local_rank}, but torch sees {count} CUDA devices: start at most {count} "
                "processes on this machine"
            )
        return torch.device("cuda", self.local_rank)

    def check_batches(self, samples: int, batch_size: int) -> None:
        """Check that every process gets a share of every batch.

        Raises:
            UsageError: If a batch has fewer samples than there are processes.
        """
        smallest = samples % batch_size or batch_size
        if smallest < self.world_size:
            raise UsageError(
                f"the last batch of an epoch has {smallest} samples for {self.world_size} processes: choose a "
                f"`batch_size` that leaves at least {self.world_size} of {samples}"
            )

    @contextlib.contextmanager
    def process_group(self, device: torch.device | None) -> Iterator[None]:
        """Connect the processes during the `with` block: nccl on CUDA devices, gloo elsewhere.

        Args:
            device: The result of `local_device`, on which the processes exchange tensors; None: they only wait for each
                other. A CUDA device becomes the current one of the calling thread, so that no process allocates memory
                on the first device of the machine.

        Raises:
            Interrupted: Another process has ended.
        """
        if self.world_size == 1:
            yield
            return
        # Imported later, by DistributedDataParallel, this module would keep the group alive in default arguments of its
        # functions, and the group's threads would outlive the interpreter, which now and then aborts the process.
        import torch.distributed.nn

        with notice_lost_process():
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)
                dist.init_process_group("nccl", device_id=device)
            else:
                dist.init_process_group("gloo", timeout=_PATIENT)
            try:
                yield
            except BaseException as error:
                if not is_connection_error(error):
                    is_first_to_end()  # before the others see the connections close
                if dist.get_backend() == "nccl":
                    raise  # a collective that waits for the others may block the group's end
                close_group()
                raise
            close_group()

    def share(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return this process's part of some rows, one of `world_size` consecutive parts of almost equal size."""
        part: npt.NDArray[np.int64] = np.array_split(rows, self.world_size)[self.rank]
        return part

    def wrap(self, net: nn.Module, device: torch.device, *, static: bool = True) -> nn.Module:
        """Return the network with its gradients averaged over the processes.

        Args:
            net: The network.
            device: Its device.
            static: Whether every backward pass is one of the result, through the same parameters, which need not be all
                of them; without it, the network may also be used as it is, but must use all parameters.
        """
        if self.world_size == 1:
            return net
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=devices, static_graph=static)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether the flag is set in any process, so that all of them act at the same step."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag), device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def union(self, flags: torch.Tensor) -> torch.Tensor:
        """Return which flags are set in any process, bool; the shape is the same in all."""
        if self.world_size == 1:
            return flags
        numbers = flags.to(torch.uint8)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers.bool()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Add up a value over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Average a value over the processes, in place."""
        if self.world_size > 1:
            self.sum(value)
            value /= self.world_size
        return value

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes, in their order, with their gradients; their numbers may differ.

        Every process computes the same of them, so that the gradient of a process's rows is that of all processes'
        losses together.
        """
        if self.world_size == 1:
            return rows
        gathered: torch.Tensor = _Gather.apply(rows, self)  # type: ignore[no-untyped-call]
        return gathered

    def _gather(self, rows: torch.Tensor) -> tuple[torch.Tensor, slice]:
        """Return the rows of all processes, and where those of this one are."""
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.world_size)]
        dist.all_gather(counts, counts[0].new_tensor([len(rows)]))
        sizes = [int(count) for count in counts]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        start = sum(sizes[: self.rank])
        own = slice(start, start + len(rows))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), own

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.world_size > 1:
            dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, distributed: Distributed) -> torch.Tensor:
        gathered, ctx.own = distributed._gather(rows.detach())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own], None


def close_group() -> None:
    """Disconnect the processes, once the gloo threads of this one are done."""
    if dist.get_backend() == "gloo":
        # gloo's threads need the interpreter's lock to free their last collective, and the group's destructor waits for
        # these threads while it holds the lock (PyTorch 2.13): let them finish first.
        time.sleep(_GLOO_CLEANUP_SECONDS)
    dist.destroy_process_group()
