"""kd_loss under DistributedDataParallel: two processes compute the gradient of one.

    python -m kdfast.examples.ddp

DistributedDataParallel averages the processes' gradients. That is the gradient of the whole batch only if each loss is
divided by what the whole batch counts: with ignored rows or weights the shards differ, and a mean of their means is
not the mean. So each process sums over its shard and divides by the count of all, times the number of processes.
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

__all__ = ["Batch", "Result", "main", "make_batch", "make_net", "shard_loss"]

IGNORE = -100


class Result(NamedTuple):
    """Largest gradient, and largest difference between the processes' gradient and that of a single process."""

    largest: float
    difference: float


class Batch(NamedTuple):
    """Inputs (N, 16), labels (N,) of which some are ignored, teacher logits (M, 10), the teacher's rows (N,)."""

    x: Tensor
    labels: Tensor
    teacher: Tensor
    rows: Tensor


def make_batch(size: int = 24) -> Batch:
    """Random data, the same in each process; most rows that do not count belong to the first process."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (size,), generator=draw)
    labels[: size // 2 : 2] = IGNORE
    labels[-1] = IGNORE
    teacher = 3 * torch.randn(100, 10, generator=draw)
    return Batch(torch.randn(size, 16, generator=draw), labels, teacher, torch.randint(100, (size,), generator=draw))


def make_net() -> nn.Sequential:
    """The student, the same in each process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


def shard_loss(net: nn.Module, batch: Batch, shard: slice) -> Tensor:
    """This process's part of the loss: its rows' sum over the mean number of rows that a process counts."""
    labels = batch.labels[shard]
    counted = (labels != IGNORE).sum().float()
    dist.all_reduce(counted)
    # The teacher's table stays whole: rows point into it.
    total: Tensor = kdfast.kd_loss(
        net(batch.x[shard]), labels, batch.teacher, batch.rows[shard], ignore_index=IGNORE, reduction="sum"
    )
    return total * dist.get_world_size() / counted.clamp_min(1)  # a batch in which nothing counts has loss 0


def work(rank: int, processes: int, folder: str) -> None:
    """One process: its shard, one step's gradient; under torchrun, rank and meeting place come by themselves."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    batch = make_batch()
    net = DistributedDataParallel(make_net())
    size = len(batch.x) // processes
    shard_loss(net, batch, slice(rank * size, (rank + 1) * size)).backward()
    if rank == 0:
        torch.save([p.grad for p in net.parameters()], f"{folder}/gradients.pt")
    dist.barrier()  # neither closes its connections while the other still uses them
    dist.destroy_process_group()


def main(processes: int = 2) -> Result:
    """Compare the gradient of several processes with that of one.

    Args:
        processes: How many share the batch; it must divide 24.

    Returns:
        The largest gradient and the largest difference.
    """
    if processes < 1 or len(make_batch().x) % processes:
        raise typer.BadParameter(f"{processes} processes do not share {len(make_batch().x)} rows evenly")
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(processes, folder), nprocs=processes)
        shared = torch.load(Path(folder) / "gradients.pt")
    batch, net = make_batch(), make_net()
    kdfast.kd_loss(net(batch.x), batch.labels, batch.teacher, batch.rows, ignore_index=IGNORE).backward()
    alone = [p.grad for p in net.parameters() if p.grad is not None]
    gaps = [float((a - b).abs().max()) for a, b in zip(alone, shared, strict=True)]
    result = Result(max(float(g.abs().max()) for g in alone), max(gaps))
    print(f"{processes} processes: {result}")
    return result


if __name__ == "__main__":
    typer.run(main)
