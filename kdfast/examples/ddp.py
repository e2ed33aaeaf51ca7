"""kd_loss under DistributedDataParallel: two processes compute the same gradient as one.

    python -m kdfast.examples.ddp

DistributedDataParallel averages the processes' gradients. If labels are ignored, shards have different numbers of
rows that count, so the average of their mean losses is not the mean loss of the batch. Therefore each process sums its
losses, divides by the number of rows that count in the whole batch, and multiplies by the number of processes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import kdfast
from kdfast.distributed.group import close_group

__all__ = ["Batch", "Result", "main", "make_batch", "make_net", "shard_loss"]

IGNORE = -100


class Result(NamedTuple):
    """Largest gradient entry, and largest difference between the gradients of several processes and of one."""

    largest: float
    difference: float


class Batch(NamedTuple):
    """Inputs (N, 16), labels (N,) with some ignored, teacher logits (M, 10), and each sample's row in them (N,)."""

    x: Tensor
    labels: Tensor
    teacher: Tensor
    rows: Tensor


def make_batch(size: int = 24) -> Batch:
    """Generate random data, equal in each process; most ignored rows belong to the first process."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (size,), generator=generator)
    labels[: size // 2 : 2] = IGNORE
    labels[-1] = IGNORE
    teacher = 3 * torch.randn(100, 10, generator=generator)
    x = torch.randn(size, 16, generator=generator)
    return Batch(x, labels, teacher, torch.randint(100, (size,), generator=generator))


def make_net() -> nn.Sequential:
    """Build the student, equal in each process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


def shard_loss(net: nn.Module, batch: Batch, shard: slice) -> Tensor:
    """Return this process's loss: the sum over its rows divided by the mean number of non-ignored rows per process."""
    labels = batch.labels[shard]
    count = (labels != IGNORE).sum().float()
    dist.all_reduce(count)
    # Only the rows are sharded: they are indices into the full table of teacher logits.
    total: Tensor = kdfast.kd_loss(
        net(batch.x[shard]), labels, batch.teacher, batch.rows[shard], ignore_index=IGNORE, reduction="sum"
    )
    return total * dist.get_world_size() / count.clamp_min(1)  # the loss is 0 if every row is ignored


def run_worker(rank: int, processes: int, folder: str) -> None:
    """Compute the gradient of one step on this process's shard, and save it in the first process."""
    # Imported later, by DistributedDataParallel, this module would keep the group alive in default arguments of its
    # functions, and the group's threads would outlive the interpreter, which now and then aborts the process.
    import torch.distributed.nn

    # Under torchrun, init_process_group("gloo") suffices.
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    batch = make_batch()
    net = DistributedDataParallel(make_net())
    size = len(batch.x) // processes
    shard_loss(net, batch, slice(rank * size, (rank + 1) * size)).backward()
    if rank == 0:
        torch.save([p.grad for p in net.parameters()], f"{folder}/gradients.pt")
    dist.barrier()  # no process closes its connections while another uses them
    close_group()


def main(processes: int = 2) -> Result:
    """Compare the gradient of several processes with that of one.

    Args:
        processes: Number of processes that share the batch; it must divide 24.

    Returns:
        Largest gradient entry and largest difference.
    """
    batch, net = make_batch(), make_net()
    if processes < 1 or len(batch.x) % processes:
        raise typer.BadParameter(f"{len(batch.x)} rows do not divide evenly among {processes} processes")
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_worker, args=(processes, folder), nprocs=processes)
        distributed = torch.load(Path(folder) / "gradients.pt")
    kdfast.kd_loss(net(batch.x), batch.labels, batch.teacher, batch.rows, ignore_index=IGNORE).backward()
    single = [p.grad for p in net.parameters() if p.grad is not None]
    differences = [float((a - b).abs().max()) for a, b in zip(single, distributed, strict=True)]
    result = Result(max(float(g.abs().max()) for g in single), max(differences))
    print(f"{processes} processes: {result}")
    return result


if __name__ == "__main__":
    typer.run(main)
