"""One of two gloo processes, whose results are compared with those of one process. Arguments: rank, file."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kdfast
from kdfast.distributed.group import close_group

N, H, K, V = 9, 5, 4, 23
SPLIT = 14  # classes of the first process


def same(got, expected, tolerance=2e-5):
    assert (got.detach().double() - expected.detach().double()).norm() <= tolerance * expected.double().norm(), (
        got, expected
    )  # fmt: skip


def split_classes(rank):
    own = slice(0, SPLIT) if rank == 0 else slice(SPLIT, V)
    labels = torch.randint(0, V, (N,))
    labels[3] = -100
    of_rows = {"alpha": torch.rand(N), "temperature": torch.rand(N) + 1, "weights": torch.rand(N)}
    cases = [
        {"divergence": "forward"}, {"divergence": "reverse", "softcap": 3.0}, {"divergence": "jsd", "beta": 0.3},
        {"label_smoothing": 0.1, "logit_scale": 0.7}, {"alpha": 0.0}, {"alpha": 1.0, "reduction": "none"}, of_rows,
    ]  # fmt: skip
    for dtype, memory in ((torch.float32, "fast"), (torch.float64, "low"), (torch.bfloat16, "fast")):
        for options in cases:
            whole = [torch.randn(*s).to(dtype).requires_grad_() for s in ((N, H), (V, H), (V,))]
            part = [whole[0], whole[1][own], whole[2][own]]
            part = [x.detach().clone().requires_grad_() for x in part]
            logits, hidden, weight = torch.randn(N + 2, V), torch.randn(N + 2, K), torch.randn(V, K)
            rows = torch.randint(0, N + 2, (N,))
            for teacher, of_part in ((logits, logits[:, own]), ((hidden, weight), (hidden, weight[own]))):
                exact = [x.detach().double().requires_grad_() for x in whole]
                expected = kdfast.linear_kd_loss(exact[0], exact[1], labels, teacher, rows, bias=exact[2], **options)
                got = kdfast.linear_kd_loss(
                    part[0], part[1], labels, of_part, rows, bias=part[2], memory=memory, chunk=4,
                    group=dist.group.WORLD, **options,
                )  # fmt: skip
                up = torch.linspace(1, 2, N) if got.dim() else torch.tensor(1.5)
                grads = torch.autograd.grad(got, part, up.to(got.dtype))
                truth = torch.autograd.grad(expected, exact, up.double())
                tolerance = 2**-6 if dtype == torch.bfloat16 else 2e-5
                same(got, expected, tolerance)
                same(grads[0], truth[0], tolerance)
                same(grads[1], truth[1][own], tolerance)
                same(grads[2], truth[2][own], tolerance)
    labels[0] = V
    with pytest.raises(IndexError, match=r"`labels\[0\]` is 23: must be in \[0, 23\)"):
        kdfast.linear_kd_loss(part[0], part[1], labels, of_part, rows, group=dist.group.WORLD)


class Model(nn.Module):
    """A body and a head; its forward returns the loss, so that wrappers gather the head's weights."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, V, bias=False)

    def forward(self, x, labels, teacher, num_items):
        hidden = torch.tanh(self.body(x))
        return kdfast.linear_kd_loss(hidden, self.head.weight, labels, teacher, num_items=num_items)


def wrapped(rank):
    x, labels, teacher = torch.randn(2, N, H), torch.randint(0, V, (2, N)), torch.randn(2, N, V)
    labels[0, :4] = -100
    plain = Model()
    plain(x, labels, teacher, None).backward()
    count = int((labels >= 0).sum())
    for wrap in (DistributedDataParallel, fully_shard):
        model = Model()
        model.load_state_dict(plain.state_dict())
        model = wrap(model)
        # The average over two processes of twice their shares.
        model(x[rank], labels[rank], teacher[rank], count / 2).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert p.grad is not None, name
            same(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad, q.grad)


def main():
    rank = int(sys.argv[1])
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    split_classes(rank)
    wrapped(rank)
    close_group()
    print("equal")


if __name__ == "__main__":
    main()
