"""Several processes training one student: `torchrun --nproc-per-node 2 -m kdfast distill ...`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from kdfast.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, as torchrun's environment says.

    Attributes:
        rank: This process, from 0; process 0 writes the run's folder.
        world: Number of processes.
        local: This process among those of its machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; one process where WORLD_SIZE is not set.

        Raises:
            UsageError: If they are not three whole numbers.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, world, local = (int(os.environ[name]) for name in names)
        except (KeyError, ValueError) as error:
            told = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
            raise UsageError(
                f"{told}: torchrun sets all three to whole numbers; start with it or unset them"
            ) from error
        return cls(rank, world, local)

    @property
    def main(self) -> bool:
        """Whether this process writes the run's folder."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """This process's own device: `cuda` becomes the CUDA device of its local rank."""
        if self.world > 1 and str(device) == "cuda":
            return torch.device("cuda", self.local)
        return device

    def check(self, samples: int, batch_size: int) -> None:
        """Make sure that every process has a share of every batch.

        Raises:
            UsageError: If a batch has fewer samples than there are processes.
        """
        smallest = samples % batch_size or batch_size
        if smallest < self.world:
            raise UsageError(
                f"the last batch of an epoch has {smallest} samples for {self.world} processes; choose a --batch-size "
                f"that leaves at least {self.world} of {samples}"
            )

    @contextlib.contextmanager
    def group(self, device: torch.device) -> Iterator[None]:
        """Connect the processes while the `with` block runs: nccl on CUDA devices, gloo elsewhere."""
        if self.world == 1:
            yield
            return
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    def wrap(self, net: nn.Module, device: torch.device) -> nn.Module:
        """The network with its gradients averaged over the processes."""
        if self.world == 1:
            return net
        return nn.parallel.DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process: all act on it at the same step."""
        if self.world == 1:
            return flag
        word = torch.tensor(int(flag), device=device)
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        return bool(word)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a value over the processes."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()
