"""kd_loss against its float64 reference: values, gradients and edge cases, on every CPU backend."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast.ops.kd_loss import topk_teacher

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 6e-8, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def case(n, c, dtype=torch.float32, teacher_dtype=torch.float16, m=None, spread=3.0):
    """Return logits, labels, teacher and rows, with an ignored row and repeated teacher rows if N allows."""
    m = m or n + 3
    logits = (spread * torch.randn(n, c)).to(dtype)
    teacher = (spread * torch.randn(m, c)).to(teacher_dtype)
    labels, rows = torch.randint(0, c, (n,)), torch.randint(0, m, (n,))
    if n > 2:
        labels[1] = -100
        rows[2] = rows[0]
    return logits, labels, teacher, rows


def loss_and_grad(logits, *args, **options):
    z = logits.detach().requires_grad_()
    loss = kdfast.kd_loss(z, *args, **options)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), grad


def exact(logits, *args, **options):
    return loss_and_grad(logits.double(), *args, **{**options, "backend": "reference"})


def eager(logits, labels, teacher, rows, *, alpha=0.5, temperature=4.0, direction="forward"):
    """The loss in plain PyTorch, in the given dtype except where autocast would use float32 too."""
    z, t = logits.float(), teacher[rows].float()
    log_p, log_q = F.log_softmax(z / temperature, 1), F.log_softmax(t / temperature, 1)
    pair = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    counted = labels != -100
    kl = F.kl_div(*pair, log_target=True, reduction="none").sum(1)[counted].mean()
    return (1 - alpha) * F.cross_entropy(z, labels) + alpha * temperature**2 * kl


def error(value, truth):
    scale = truth.abs().max().clamp_min(1e-12)
    return ((value.double() - truth).abs().max() / scale).item()


def close(result, truth, dtype, slack=3e-6):
    """Larger where the gradient is a difference of large logarithms: reverse divergences and far-spread logits."""
    return error(result[0], truth[0]) < 3e-6 and error(result[1], truth[1]) < slack + ROUNDING[dtype] * 1.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_matches_float64(kd_loss_backend, dtype, teacher_dtype, direction):
    for (n, c), t in itertools.product(
        [(1, 1), (3, 2), (5, 15), (4, 16), (7, 17), (6, 100), (3, 1029)], [1.0, 2.0, 3.0, 4.0]
    ):
        args = case(n, c, dtype, teacher_dtype)
        for reduction in ("mean", "sum", "none"):
            options = {"temperature": t, "reduction": reduction, "direction": direction, "weights": torch.rand(n)}
            result = loss_and_grad(*args, **options, backend=kd_loss_backend)
            slack = 1e-5 if direction == "reverse" else 3e-6
            assert close(result, exact(*args, **options), dtype, slack), (n, c, t, reduction)
            assert result[0].dtype == torch.float32
            assert result[1].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_error_at_most_eager_pytorchs(dtype, direction):
    for n, c, t in [
        (128, 10, 4.0),
        (128, 100, 4.0),
        (64, 1000, 2.0),
        (8, 32000, 4.0),
        (4, 131072, 1.0),
        (2, 262144, 3.0),
    ]:
        args = case(n, c, dtype)
        truth = exact(*args, temperature=t, direction=direction)
        ours = loss_and_grad(*args, temperature=t, direction=direction)
        z = args[0].clone().requires_grad_()
        theirs = eager(z, *args[1:], temperature=t, direction=direction)
        (grad,) = torch.autograd.grad(theirs, z)
        assert error(ours[0], truth[0]) <= error(theirs.detach(), truth[0]) + 1e-6
        assert error(ours[1], truth[1]) <= error(grad, truth[1]) + 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t_squared", [True, False])
def test_alpha_and_t_squared(kd_loss_backend, alpha, t_squared):
    args = case(6, 37)
    for temperature in (1.0, 4.0, 5.0):
        options = {"alpha": alpha, "t_squared": t_squared, "temperature": temperature}
        assert close(loss_and_grad(*args, **options, backend=kd_loss_backend), exact(*args, **options), torch.float32)


def test_alpha_one_needs_no_labels_and_alpha_zero_reads_no_teacher(kd_loss_backend):
    z, y, t, r = case(5, 12)
    y[1] = 0
    with_labels = kdfast.kd_loss(z, y, t, r, alpha=1, backend=kd_loss_backend)
    torch.testing.assert_close(kdfast.kd_loss(z, None, t, r, alpha=1, backend=kd_loss_backend), with_labels)
    nothing = torch.full_like(t, float("nan"))
    plain = kdfast.kd_loss(z, y, nothing, r, alpha=0, backend=kd_loss_backend)
    torch.testing.assert_close(plain, F.cross_entropy(z, y))


@pytest.mark.parametrize("way", ["kernel", "weights with a gradient", "vmap"])
def test_weights_of_ignored_rows_and_weights_that_cancel(kd_loss_backend, way):
    z, y, t, r = case(4, 9)
    y[:] = torch.tensor([1, -100, 2, 3])

    def loss(weights, **options):
        if way == "vmap":
            call = lambda x: kdfast.kd_loss(x, y, t, r, weights=weights, backend=kd_loss_backend, **options)  # noqa: E731
            return torch.func.vmap(call)(z[None])[0]
        weights = weights.clone().requires_grad_(way == "weights with a gradient")
        return kdfast.kd_loss(z, y, t, r, weights=weights, backend=kd_loss_backend, **options).detach()

    known = torch.tensor([0.5, 1.0, 2.0, 1.0])
    for unknown in (float("nan"), float("inf")):
        hidden = torch.where(y == -100, unknown, known)
        for reduction in ("mean", "none"):
            torch.testing.assert_close(loss(hidden, reduction=reduction), loss(known, reduction=reduction))
    assert loss(torch.tensor([1.0, 5.0, -2.0, 1.0])) == 0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [1, 4, 33])
def test_topk_teacher(kd_loss_backend, direction, k):
    z, y, t, r = case(6, 33)
    # Far-spread logits leave the other classes almost no probability.
    spreads = (1.0, 60.0) if direction == "forward" else (1.0,)
    for temperature, alpha, spread in itertools.product((1.0, 4.0, 3.0), (0.5, 1.0), spreads):
        sparse = topk_teacher(t, k, temperature)
        if direction == "reverse" and k == 33:
            continue  # no other classes are left; tested with the full teacher
        options = {"temperature": temperature, "direction": direction, "alpha": alpha}
        result = loss_and_grad(spread * z, y, sparse, r, **options, backend=kd_loss_backend)
        assert close(result, exact(spread * z, y, sparse, r, **options), torch.float32, slack=1e-5)


def test_topk_of_all_classes_is_the_full_loss(kd_loss_backend):
    z, y, t, r = case(6, 33)
    full = loss_and_grad(z, y, t, r, backend=kd_loss_backend)
    sparse = loss_and_grad(z, y, topk_teacher(t, 33, 4.0), r, backend=kd_loss_backend)
    torch.testing.assert_close(sparse, full)
    less = kdfast.kd_loss(z, None, topk_teacher(t, 3, 4.0), r, alpha=1, backend=kd_loss_backend)
    assert less < kdfast.kd_loss(z, None, t, r, alpha=1, backend=kd_loss_backend)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_any_strides(kd_loss_backend, layout):
    z, y, t, r = case(6, 40)
    make = {
        "transposed": lambda x: x.t().contiguous().t(),
        "strided": lambda x: torch.stack([x, x], 2).flatten(1)[:, ::2],
        "expanded": lambda x: x[:1].expand(x.shape[0], -1),
        "offset": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    }[layout]
    z2, t2 = make(z), make(t)
    y2, r2 = torch.stack([y, y], 1)[:, 0], torch.stack([r, r], 1)[:, 0]
    result = loss_and_grad(z2, y2, t2, r2, backend=kd_loss_backend)
    expected = loss_and_grad(z2.contiguous(), y, t2.contiguous(), r, backend=kd_loss_backend)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_masked_classes(kd_loss_backend, direction):
    z, y, t, r = case(6, 40)
    masked = torch.arange(40) % 3 == 0
    z[:, masked], t[:, masked] = -math.inf, -math.inf
    y = torch.where(y < 0, y, 1)
    result = loss_and_grad(z, y, t, r, direction=direction, backend=kd_loss_backend)
    assert result[0].isfinite()
    assert close(result, exact(z, y, t, r, direction=direction), torch.float32)
    assert (result[1][:, masked] == 0).all()


def test_masks_on_one_side(kd_loss_backend):
    z, y, t, r = case(6, 40)
    y = torch.where(y < 0, y, 1)
    only_teacher = t.clone()
    only_teacher[:, 5] = -math.inf
    assert close(
        loss_and_grad(z, y, only_teacher, r, backend=kd_loss_backend), exact(z, y, only_teacher, r), torch.float32
    )
    z[:, 5] = -math.inf
    assert kdfast.kd_loss(z, y, t, r, backend=kd_loss_backend) == math.inf
    assert kdfast.kd_loss(z, y, only_teacher, r, direction="reverse", backend=kd_loss_backend).isfinite()


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_large_logits(kd_loss_backend, value):
    z, y, t, r = case(6, 40, teacher_dtype=torch.float32)
    z[:, 3], t[:, 7] = value, value
    assert close(loss_and_grad(z, y, t, r, backend=kd_loss_backend), exact(z, y, t, r), torch.float32)
    shifted = loss_and_grad((z + value).round(), y, (t + value).round(), r, backend=kd_loss_backend)
    assert close(shifted, exact((z + value).round(), y, (t + value).round(), r), torch.float32)


def test_no_rows_one_class_all_ignored(kd_loss_backend):
    empty = torch.empty(0, 5), torch.empty(0, dtype=torch.int64), torch.randn(3, 5), torch.empty(0, dtype=torch.int64)
    loss, grad = loss_and_grad(*empty, backend=kd_loss_backend)
    assert loss == 0
    assert grad.shape == (0, 5)
    loss, grad = loss_and_grad(*case(4, 1), backend=kd_loss_backend)
    assert loss == 0
    assert (grad == 0).all()
    z, y, t, r = case(4, 9)
    for reduction in ("mean", "sum", "none"):
        loss, grad = loss_and_grad(z * math.nan, y.fill_(-100), t, r, reduction=reduction, backend=kd_loss_backend)
        assert (loss == 0).all()
        assert (grad == 0).all()


@pytest.mark.parametrize("operand", ["logits", "teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_not_hidden(kd_loss_backend, operand, value):
    z, y, t, r = case(5, 50, teacher_dtype=torch.float32)
    for column in (0, 20, 49):
        z2, t2 = z.clone(), t.clone()
        (z2 if operand == "logits" else t2)[:, column] = value
        loss, grad = loss_and_grad(z2, y, t2, r, backend=kd_loss_backend)
        assert loss.isnan()
        assert grad[0].isnan().all()


def test_ignore_index_and_weights_in_the_mean(kd_loss_backend):
    z, y, t, r = case(6, 11)
    w = torch.rand(6, dtype=torch.float64)
    y = torch.where(y == -100, 255, y)
    mean = kdfast.kd_loss(z, y, t, r, weights=w, ignore_index=255, backend=kd_loss_backend)
    rows = kdfast.kd_loss(z, y, t, r, reduction="none", ignore_index=255, backend=kd_loss_backend)
    assert rows[1] == 0
    torch.testing.assert_close(mean, (rows * w).sum().float() / w[y != 255].sum().float())


def test_weights_get_a_gradient(kd_loss_backend):
    z, y, t, r = case(6, 11)
    for reduction in ("mean", "sum", "none"):
        z1, z2 = z.clone().requires_grad_(), z.double().requires_grad_()
        w1 = torch.rand(6, requires_grad=True)
        w2 = w1.detach().double().requires_grad_()
        kdfast.kd_loss(z1, y, t, r, weights=w1, reduction=reduction, backend=kd_loss_backend).sum().backward()
        kdfast.kd_loss(z2, y, t, r, weights=w2, reduction=reduction, backend="reference").sum().backward()
        torch.testing.assert_close(w1.grad.double(), w2.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(z1.grad.double(), z2.grad, rtol=1e-5, atol=1e-6)


def test_inputs_are_not_written(kd_loss_backend):
    args = case(6, 70)
    copies = [x.clone() for x in args]
    z = args[0].requires_grad_()
    loss = kdfast.kd_loss(*args, backend=kd_loss_backend)
    (3 * loss).backward()
    for x, copy in zip(args, copies, strict=True):
        assert torch.equal(x.detach(), copy)
    assert z.grad is not None


def test_terms_are_detached_rows(kd_loss_backend):
    z, y, t, r = case(6, 30)
    z.requires_grad_()
    for direction in ("forward", "reverse"):
        ce, kl = kdfast.kd_loss_terms(z, y, t, r, temperature=4.0, direction=direction, backend=kd_loss_backend)
        assert not ce.requires_grad
        assert ce[1] == kl[1] == 0
        rows = kdfast.kd_loss(z, y, t, r, alpha=0.3, reduction="none", direction=direction, backend=kd_loss_backend)
        torch.testing.assert_close(0.7 * ce + 0.3 * 16 * kl, rows.detach())


def test_module():
    args = case(6, 30)
    module = kdfast.KDLoss(alpha=0.2, temperature=2.0, reduction="sum")
    torch.testing.assert_close(module(*args), kdfast.kd_loss(*args, alpha=0.2, temperature=2.0, reduction="sum"))
    assert "temperature=2.0" in repr(module)
    with pytest.raises(TypeError, match="tau"):
        kdfast.KDLoss(tau=3)


def test_class_weights_of_the_module_are_a_buffer():
    args, weights = case(6, 30), torch.rand(30)
    module = kdfast.KDLoss(class_weights=weights)
    assert torch.equal(module(*args), kdfast.kd_loss(*args, class_weights=weights))
    assert torch.equal(module.state_dict()["class_weights"], weights)
    moved = kdfast.KDLoss(class_weights=weights).to("meta")
    assert moved(*(x.to("meta") for x in args)).device.type == "meta"
    assert "class_weights" in repr(module)
    assert not kdfast.KDLoss().state_dict()
    assert "class_weights" not in repr(kdfast.KDLoss())


MEMORY = """
import json, sys, torch, kdfast
from pathlib import Path
n, c = 2048, 4096
z = torch.randn(n, c, requires_grad=True)
t, y, r = torch.randn(64, c).half(), torch.randint(0, c, (n,)), torch.randint(0, 64, (n,))
kdfast.kd_loss(z[:4], y[:4], t, r[:4]).backward()
z.grad = None
Path("/proc/self/clear_refs").write_text("5")
status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
before = status("VmRSS")
torch.autograd.grad(kdfast.kd_loss(z, y, t, r) * 2, z)
print(json.dumps([(status("VmHWM") - before) / (n * c * 4)]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
def test_extra_memory_is_one_gradient():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    (gradients,) = json.loads(done.stdout)
    assert 0.9 < gradients < 1.15


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_training_reaches_the_weights_of_the_reference(direction):
    x, y = torch.randn(256, 20), torch.randint(0, 10, (256,))
    teacher = (3 * torch.randn(256, 10)).half()
    ends = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for step in range(200):
            rows = torch.arange(64) + 64 * (step % 4)
            loss = kdfast.kd_loss(net(x[rows]), y[rows], teacher, rows, direction=direction, backend=backend)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
