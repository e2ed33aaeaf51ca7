"""Label smoothing of the cross-entropy: against ``torch.nn.functional.cross_entropy`` and float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast.errors import ShapeError
from kdfast.ops.kd_loss import fast_path, topk_teacher
from kdfast.ops.kd_loss.autograd import kd_loss_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 6e-8, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KINDS = {
    "kl": {},
    "reverse": {"direction": "reverse"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "dkd": {"divergence": "dkd", "dkd_weights": (0.7, 3.0)},
    "standardized": {"divergence": "standardized"},
    "top-k": {},
}


def case(c, n=7, dtype=torch.float32):
    logits, teacher = (3 * torch.randn(n, c)).to(dtype), 3 * torch.randn(n, c)
    labels = torch.randint(0, c, (n,))
    labels[1] = -100
    return logits, labels, teacher


def loss_and_grad(z, *args, **options):
    z = z.detach().requires_grad_()
    loss = kdfast.kd_loss(z, *args, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def pytorch(z, y, smoothing, **options):
    z = z.double().requires_grad_()
    loss = F.cross_entropy(z, y, label_smoothing=smoothing, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def assert_close(found, expected, dtype=torch.float32):
    for a, b, slack in zip(found, expected, (3e-6, 1e-5 + 1.01 * ROUNDING[dtype]), strict=True):
        assert (a.double() - b).abs().max() <= slack * b.abs().max() + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.1, 0.9])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_cross_entropy(kd_loss_options_backend, dtype, smoothing, reduction):
    for c in (1, 2, 15, 16, 33, 1029):
        z, y, t = case(c, dtype=dtype)
        options = {"alpha": 0.0, "label_smoothing": smoothing, "reduction": reduction}
        found = loss_and_grad(z, y, t, **options, backend=kd_loss_options_backend)
        assert_close(found, pytorch(z, y, smoothing, reduction=reduction), dtype)


def test_another_ignore_index_and_strides(kd_loss_options_backend):
    z, y, t = case(21)
    y[2], y[1] = 5, 3
    found = loss_and_grad(
        z.t().contiguous().t(), y, t, alpha=0.0, label_smoothing=0.2, ignore_index=5, backend=kd_loss_options_backend
    )
    assert_close(found, pytorch(z, y, 0.2, ignore_index=5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
def test_adds_to_every_divergence(kd_loss_options_backend, kind, temperature):
    """The loss and its gradient are linear in the two terms."""
    z, y, t = case(37)
    teacher = topk_teacher(t, 5, temperature) if kind == "top-k" else t
    options = {**KINDS[kind], "temperature": temperature, "backend": kd_loss_options_backend}
    found = loss_and_grad(z, y, teacher, alpha=0.3, label_smoothing=0.15, **options)
    parts = [
        loss_and_grad(z.double(), y, teacher, alpha=1.0, **options | {"backend": "reference"}),
        pytorch(z, y, 0.15),
    ]
    assert_close(found, [0.3 * kd + 0.7 * ce for kd, ce in zip(*parts, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    z, y, t = case(5, dtype=torch.float64)
    teacher = topk_teacher(t, 2, 4.0) if kind == "top-k" else t
    options = {**KINDS[kind], "label_smoothing": 0.3}
    assert torch.autograd.gradcheck(lambda x: kdfast.kd_loss(x, y, teacher, **options), z.requires_grad_())


def test_smoothed_terms(kd_loss_options_backend):
    z, y, t = case(19)
    ce, kl = kdfast.kd_loss_terms(z, y, t, label_smoothing=0.2, backend=kd_loss_options_backend)
    torch.testing.assert_close(ce.double(), pytorch(z, y, 0.2, reduction="none")[0], rtol=1e-6, atol=1e-7)
    plain = kdfast.kd_loss_terms(z, y, t, backend=kd_loss_options_backend)
    torch.testing.assert_close(kl, plain[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_class_makes_the_cross_entropy_infinite(kd_loss_options_backend, kind):
    """As in PyTorch; the gradient stays finite."""
    z, y, t = case(20)
    y[1] = 0
    at = (y + 1) % 20
    z[range(len(z)), at] = t[range(len(z)), at] = -math.inf
    teacher = topk_teacher(t, 4, 4.0) if kind == "top-k" else t
    loss, grad = loss_and_grad(
        z, y, teacher, alpha=0.5, label_smoothing=0.1, **KINDS[kind], backend=kd_loss_options_backend
    )
    assert loss.item() == math.inf
    assert grad.isfinite().all()
    expected = pytorch(z, y, 0.1)
    assert expected[0].item() == math.inf
    found = loss_and_grad(z, y, teacher, alpha=0.0, label_smoothing=0.1, backend=kd_loss_options_backend)
    assert found[0].item() == math.inf
    assert_close((grad[0, at[0]] * 2, found[1]), (expected[1][0, at[0]], expected[1]))


def test_nan_is_not_hidden(kd_loss_options_backend):
    for value in (math.nan, math.inf):
        z, y, t = case(20)
        z[3, 7] = value
        loss, _ = loss_and_grad(z, y, t, label_smoothing=0.1, backend=kd_loss_options_backend)
        assert loss.isnan()


@pytest.mark.parametrize("masked", [False, True])
def test_a_hundred_thousand_classes(masked):
    z, y, t = case(100_003, n=3)
    options = {"alpha": 0.4, "label_smoothing": 0.2}
    if masked:
        z[:, 5000] = t[:, 5000] = -math.inf
        assert loss_and_grad(z, y, t, **options)[0].item() == math.inf
    else:
        assert_close(loss_and_grad(z, y, t, **options), loss_and_grad(z.double(), y, t, **options))


def test_far_from_zero():
    """The mean of the logits does not cancel against an offset common to all of them."""
    z, y, t = case(40)
    z = (z + 1e4).round(decimals=1)
    options = {"alpha": 0.0, "label_smoothing": 0.3}
    assert_close(loss_and_grad(z, y, t, **options), pytorch(z, y, 0.3))


def test_zero_is_the_default_and_the_shortcut_gives_the_same_bits(monkeypatch):
    z, y, t = case(100)
    results = [loss_and_grad(z, y, t, **k) for k in ({}, {"label_smoothing": 0.0}, {"label_smoothing": 0.1})]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    monkeypatch.setattr(fast_path, "_kernel", lambda: None)
    general = [loss_and_grad(z, y, t, label_smoothing=s) for s in (0.0, 0.1)]
    for a, b in zip(results[1:], general, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan])
def test_out_of_range(kd_loss_options_backend, value):
    z, y, t = case(5)
    with pytest.raises(ShapeError, match=f"`label_smoothing` is {value}: must be at least 0 and below 1"):
        kdfast.kd_loss(z, y, t, label_smoothing=value, backend=kd_loss_options_backend)


def test_not_a_number():
    z, y, t = case(5)
    with pytest.raises(TypeError, match="`label_smoothing` is 'much': pass a number"):
        kdfast.kd_loss(z, y, t, label_smoothing="much")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    z, y, t = case(6)
    alphas, temperatures = torch.rand(7), torch.rand(7) + 1
    tensors = (z.requires_grad_(grad), y, t, None, None, None, None, alphas, temperatures)
    numbers = (0.5, 1.0, True, -100, "mean", False, "kl", 0.0, 0.0, 0.1)
    torch.library.opcheck(kd_loss_op, (*tensors, *numbers, "native", grad))
