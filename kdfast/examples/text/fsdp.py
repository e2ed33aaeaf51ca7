"""linear_kd_loss under FSDP2: processes that each hold a part of the weights compute the same gradient as one.

    python -m kdfast.examples.text.fsdp

The loss is computed in the ``forward`` of the module that owns both last layers, where their weights are whole. As with
DistributedDataParallel, gradients are averaged over processes: each one divides by the number of tokens in the whole
batch, and multiplies by the number of processes.
"""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

import kdfast
from kdfast.distributed.group import close_group
from kdfast.examples._causal_lm import CausalLM, load_texts

__all__ = ["Distillation", "Result", "main", "make_batch", "make_distillation"]

IGNORE = -100


class Result(NamedTuple):
    """Largest gradient entry, and largest difference between the gradients of several processes and of one."""

    largest: float
    difference: float


class Distillation(nn.Module):
    """A student and its teacher, whose ``forward`` returns the loss.

    Args:
        student: The student.
        teacher: The teacher.
    """

    def __init__(self, student: CausalLM, teacher: CausalLM) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def forward(self, tokens: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
        """Return the losses of tokens (B, L) with labels (B, L), summed and divided by ``num_items``."""
        loss: Tensor = kdfast.linear_kd_loss(
            self.student.hidden(tokens), self.student.head.weight, labels,
            (self.teacher.hidden(tokens), self.teacher.head.weight), alpha=0.9, temperature=2.0, num_items=num_items,
        )  # fmt: skip
        return loss


def make_distillation() -> Distillation:
    """Build student and teacher, equal in each process."""
    torch.manual_seed(0)
    return Distillation(CausalLM(width=16, layers=2), CausalLM(width=32, layers=2))


def make_batch(size: int = 8) -> tuple[Tensor, Tensor]:
    """Return tokens and labels (size, 32); the first texts have long prompts, which are ignored."""
    texts = load_texts(length=32, count=size)
    labels = texts[:, 1:].clone()
    labels[: size // 2, :24] = IGNORE
    return texts[:, :-1], labels


def shard(module: Distillation) -> Distillation:
    """Split the weights of each block, and of everything else, over the processes."""
    for model in (module.student, module.teacher):
        for block in model.blocks:
            fully_shard(block)
    fully_shard(module)  # has both last layers, so that they are whole in its ``forward``
    return module


def run_worker(rank: int, processes: int, folder: str) -> None:
    """Compute the gradient of one step on this process's texts, and save it in the first process."""
    # Under torchrun, init_process_group("gloo") suffices.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes, timeout=timedelta(minutes=2)
    )
    tokens, labels = (x.chunk(processes)[rank] for x in make_batch())
    count = (labels != IGNORE).sum().float()
    dist.all_reduce(count)
    module = shard(make_distillation())
    loss = module(tokens, labels, count) * processes
    loss.backward()
    parts = [p.grad for p in module.student.parameters()]
    if not all(isinstance(part, DTensor) for part in parts):
        raise RuntimeError("FSDP2 did not split the gradients")
    gradients = [part.full_tensor() for part in parts if isinstance(part, DTensor)]
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.barrier()  # no process closes its connections while another uses them
    close_group()


def main(processes: int = 2) -> Result:
    """Compare the gradient of several processes with that of one.

    Args:
        processes: Number of processes that share the batch; it must divide 8.

    Returns:
        Largest gradient entry and largest difference.
    """
    module, (tokens, labels) = make_distillation(), make_batch()
    if processes < 1 or len(tokens) % processes:
        raise typer.BadParameter(f"{len(tokens)} texts do not divide evenly among {processes} processes")
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_worker, args=(processes, folder), nprocs=processes)
        distributed = torch.load(Path(folder) / "gradients.pt")
    module(tokens, labels, (labels != IGNORE).sum()).backward()
    single = [p.grad for p in module.student.parameters() if p.grad is not None]
    differences = [float((a - b).abs().max()) for a, b in zip(single, distributed, strict=True)]
    result = Result(max(float(g.abs().max()) for g in single), max(differences))
    print(f"{processes} processes: {result}")
    return result


if __name__ == "__main__":
    typer.run(main)
