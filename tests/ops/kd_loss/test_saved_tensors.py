"""What kd_loss keeps for the backward pass goes through PyTorch's hooks for saved tensors, as in checkpointing."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast.ops import _torch_compat
from kdfast.ops.kd_loss import gradient_buffer, topk_teacher
from kdfast.ops.kd_loss.autograd import kd_loss_op

N, C = 32, 1024

LOSSES = {
    "fast path": lambda z, y, t, w: kdfast.kd_loss(z, y, t),
    "module": lambda z, y, t, w: kdfast.KDLoss(alpha=0.3)(z, y, t),
    "native": lambda z, y, t, w: kdfast.kd_loss(z, y, t, backend="native"),
    "bfloat16": lambda z, y, t, w: kdfast.kd_loss(z.bfloat16(), y, t),
    "float16": lambda z, y, t, w: kdfast.kd_loss(z.half(), y, t),
    "no reduction": lambda z, y, t, w: kdfast.kd_loss(z, y, t, reduction="none").mean(),
    "reverse": lambda z, y, t, w: kdfast.kd_loss(z, y, t, direction="reverse"),
    "top-k": lambda z, y, t, w: kdfast.kd_loss(z, y, topk_teacher(t, 5, 4.0)),
    "weights with a gradient": lambda z, y, t, w: kdfast.kd_loss(z, y, t, weights=w),
    "custom operator": lambda z, y, t, w: kd_loss_op(
        z,
        y,
        t,
        None,
        None,
        None,
        None,
        None,
        None,
        0.5,
        4.0,
        True,
        -100,
        "mean",
        False,
        "kl",
        0.0,
        0.0,
        0.0,
        "native",
        True,
    )[0],
}


def batch():
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(N, 8, generator=generator), torch.randn(N, C, generator=generator)
    y, head = torch.randint(0, C, (N,), generator=generator), torch.randn(8, C, generator=generator)
    return x, y, t, torch.rand(N, generator=generator), head.requires_grad_()


def gradients(loss, context=None, retain=False):
    """The gradients of the head and of the weights; with retain, those of a second backward pass."""
    x, y, t, w, head = batch()
    w.requires_grad_()
    with context or nullcontext():
        total = loss(x @ head, y, t, w)
    if retain:
        total.backward(retain_graph=True)
        head.grad = w.grad = None
    total.backward()
    return head.grad, w.grad


def check_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", list(LOSSES))
def test_everything_large_passes_the_hooks(name):
    packed = []

    def pack(tensor):
        packed.append(tensor.numel() >= N * C)
        return tensor

    x, y, t, w, head = batch()
    z = x @ head
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        LOSSES[name](z, y, t, w.requires_grad_())
    assert any(packed), "the gradient of the logits is not among the saved tensors"


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_are_the_same_under_hooks(name, retain):
    loss = LOSSES[name]
    expected = gradients(loss)
    check_equal(gradients(loss, save_on_cpu(), retain), expected)
    check_equal(gradients(loss, saved_tensors_hooks(lambda x: x, lambda x: x), retain), expected)
    for reentrant in (False, True):
        check_equal(gradients(lambda *a, r=reentrant: checkpoint(loss, *a, use_reentrant=r), retain=retain), expected)


def test_what_a_hook_keeps_is_not_scaled_in_place():
    kept = []

    def pack(tensor):
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    x, y, t, _, head = batch()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = kdfast.kd_loss(x @ head, y, t)
    (loss * 3).backward()
    head.grad.zero_()
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


def test_without_hooks_the_gradient_is_scaled_in_place():
    x, y, t, _, head = batch()
    z = (x @ head).detach().repeat(64, 1).requires_grad_()
    loss = kdfast.kd_loss(z, y.repeat(64), t.repeat(64, 1))
    gradient_buffer.release()
    with torch.profiler.profile(profile_memory=True) as run:
        (loss * 3).backward()
    sizes = [e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes, default=0) < z.nbytes


@pytest.mark.parametrize("retain", [False, True])
def test_errors_of_a_freed_graph_and_of_second_derivatives_are_the_same(retain):
    x, y, t, _, head = batch()
    z = (x @ head).detach().requires_grad_()
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        loss = kdfast.kd_loss(z, y, t)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        (grad.square().sum() + z.sum()).backward()
    torch.autograd.grad(loss, z, retain_graph=retain)
    if retain:
        torch.autograd.grad(loss, z)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


def test_hooks_count_as_active_if_pytorch_does_not_tell(monkeypatch):
    monkeypatch.setattr(_torch_compat, "_saved_tensors_hooks", None)
    expected = gradients(LOSSES["fast path"])
    monkeypatch.undo()
    check_equal(gradients(LOSSES["fast path"]), expected)


MEASURE = """
import os, resource, sys
import torch
import torch._dynamo  # by checkpoint
from torch.utils.checkpoint import checkpoint
import torch.nn.functional as F
import kdfast

for form in ("textbook", "ours"):
    if os.fork() == 0:
        break
    os.wait()
else:
    sys.exit()
CHUNKS, N, D, V = 16, 128, 8, 16384
head = torch.randn(D, V).mul_(0.1).requires_grad_()
x, y, t = torch.randn(CHUNKS, N, D), torch.randint(0, V, (CHUNKS, N)), torch.randn(N, V).half()


def textbook(h, labels):
    z = h @ head
    kl = F.kl_div(F.log_softmax(z / 4, 1), F.log_softmax(t.float() / 4, 1), log_target=True, reduction="batchmean")
    return 0.5 * F.cross_entropy(z, labels) + 0.5 * 16 * kl


def ours(h, labels):
    return kdfast.kd_loss(h @ head, labels, t)


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096


run = {"textbook": textbook, "ours": ours}[form]
checkpoint(run, x[0], y[0], use_reentrant=False).backward()  # libraries, threads and buffers
before = resident()
loss = sum(checkpoint(run, x[i], y[i], use_reentrant=False) for i in range(CHUNKS))
after = resident()
loss.backward()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(before, after, peak)
"""


def measure():
    """Return three numbers of MiB for the textbook form and for ours."""
    # The C library returns every large block at once, so that the resident memory is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", MEASURE]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [[int(number) / 2**20 for number in line.split()] for line in run.stdout.splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory from /proc")
def test_checkpointed_chunks_need_no_more_memory_than_the_textbook_form():
    textbook, ours = measure()
    assert ours[1] <= 1.2 * textbook[1], f"after the forward pass: {ours[1]:.0f} MiB, textbook {textbook[1]:.0f}"
    assert ours[2] <= 1.2 * textbook[2], f"at the peak: {ours[2]:.0f} MiB, textbook {textbook[2]:.0f}"
