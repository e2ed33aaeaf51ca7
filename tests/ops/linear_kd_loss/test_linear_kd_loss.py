"""`linear_kd_loss` against the formula in float64: teachers, divergences, dtypes, frozen parts, reductions, chunks."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

import kdfast
from kdfast.ops.kd_loss.linear.reference import linear_kd_loss_reference

sys.path.insert(0, str(Path(__file__).parent))

import naive
from formula_cases import CASES, ROUNDING, H, K, N, V, operands, relative_error, teacher_of


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(("kind", "divergence"), CASES)
@pytest.mark.parametrize(("memory", "softcap", "scale"), [("fast", None, 1.0), ("low", 3.0, 0.6), ("fast", 3.0, 1.5)])
def test_matches_the_formula(kind, divergence, dtype, memory, softcap, scale):
    hidden, weight, bias, labels = operands(dtype)
    teacher, rows, of_rows = teacher_of(kind, 2.0)
    options = {"alpha": 0.6, "temperature": 2.0}
    loss = kdfast.linear_kd_loss(
        hidden, weight, labels, teacher, rows, bias=bias, divergence=divergence, beta=0.3, softcap=softcap,
        logit_scale=scale, memory=memory, chunk=4, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    z = naive.layer(*exact, softcap, scale)
    expected = naive.loss(z, labels, of_rows, kind=divergence, beta=0.3, **options).sum() / (labels >= 0).sum()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The tail of a top-k teacher is float32.
    tolerance = max(ROUNDING[dtype], 1e-6 if kind == "topk" else 0)
    assert relative_error(loss, expected.detach()) < tolerance
    for x, got, truth in zip(exact, grads, torch.autograd.grad(expected, exact), strict=True):
        assert got.dtype == dtype
        assert got.shape == x.shape
        assert relative_error(got, truth) < tolerance


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_only_trained_tensors_get_gradients(memory, trained, reduction):
    hidden, weight, bias, labels = operands(torch.float32)
    inputs = [x.detach().requires_grad_(need) for x, need in zip((hidden, weight, bias), trained, strict=True)]
    teacher, rows, of_rows = teacher_of("rows", 2.0)
    weights = torch.rand(N)
    loss = kdfast.linear_kd_loss(
        inputs[0], inputs[1], labels, teacher, rows, bias=inputs[2], weights=weights, temperature=2.0, alpha=0.4,
        reduction=reduction, memory=memory, chunk=3,
    )  # fmt: skip
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = naive.loss(
        naive.layer(*exact), labels, of_rows, alpha=0.4, temperature=2.0, kind="forward", weights=weights
    )
    if reduction != "none":
        divisor = weights[labels >= 0].double().sum() if reduction == "mean" else 1
        expected = expected.sum() / divisor
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert loss.requires_grad == any(trained)
    if not any(trained):
        return
    up = torch.rand_like(loss)
    loss.backward(up)
    truth = torch.autograd.grad(expected, exact, up.double())
    for x, need, grad in zip(inputs, trained, truth, strict=True):
        assert (x.grad is not None) == need
        if need:
            assert relative_error(x.grad, grad) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_chunks_do_not_change_the_result(dtype, memory):
    hidden, weight, bias, labels = operands(dtype, n=40)
    teacher, rows, _ = teacher_of("rows", 4.0, n=40)
    results = []
    for chunk in (1, 7, 40, 1000, "auto"):
        loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, rows, bias=bias, chunk=chunk, memory=memory)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))))
    for result in results[1:]:
        for got, first in zip(result, results[0], strict=True):
            assert relative_error(got, first.double()) < 2 * ROUNDING[dtype]


def test_losses_equal_those_of_kd_loss_on_the_logits():
    hidden, weight, _, labels = operands(torch.float32)
    teacher, rows, _ = teacher_of("rows", 4.0)
    z = hidden.detach() @ weight.detach().T
    of_rows = {"alpha": torch.rand(N), "temperature": torch.rand(N) + 1}
    for options in ({"reduction": "none"}, {"label_smoothing": 0.1}, {"class_weights": torch.rand(V)}, of_rows):
        got = kdfast.linear_kd_loss(hidden, weight, labels, teacher, rows, **options)
        expected = kdfast.kd_loss(z, labels, teacher, rows, **options)
        torch.testing.assert_close(got.detach(), expected, rtol=1e-5, atol=1e-6)


def test_soft_labels_and_teacher_kinds():
    hidden, weight, _, labels = operands(torch.float32)
    teacher, rows, _ = teacher_of("rows", 4.0)
    z = hidden.detach() @ weight.detach().T
    for y in (labels, torch.rand(N, V).softmax(1)):
        for kind, values in (("probs", teacher.softmax(1)), ("logprobs", teacher.log_softmax(1))):
            options = {"teacher_kind": kind, "divergence": "reverse"}
            loss = kdfast.linear_kd_loss(hidden, weight, y, values, rows, chunk=4, **options)
            (grad,) = torch.autograd.grad(loss, hidden)
            exact = z.double().requires_grad_()
            expected = kdfast.kd_loss(exact, y, teacher, rows, direction="reverse")
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
            (of_z,) = torch.autograd.grad(expected, exact)
            assert relative_error(grad, of_z @ weight.detach().double()) < 5e-6


@pytest.mark.parametrize("options", [{}, {"class_weights": torch.linspace(0.1, 2, V)}], ids=["plain", "class weights"])
def test_num_items_replaces_the_divisor(options):
    hidden, weight, _, labels = operands(torch.float32)
    teacher, rows, _ = teacher_of("rows", 4.0)
    parts = []
    for part in (slice(0, 4), slice(4, N)):
        for count in (8, torch.tensor(8)):
            of_part = (hidden[part], weight, labels[part], teacher, rows[part])
            parts.append(kdfast.linear_kd_loss(*of_part, num_items=count, **options))
    assert torch.equal(parts[0], parts[1])
    assert int((labels >= 0).sum()) == 8
    whole = kdfast.linear_kd_loss(hidden, weight, labels, teacher, rows, **options)
    torch.testing.assert_close(parts[0] + parts[2], whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_leading_dimensions(dtype):
    hidden, weight, _, labels = operands(dtype, n=12)
    teacher, _, _ = teacher_of("dense", 4.0, n=12)
    flat = kdfast.linear_kd_loss(hidden, weight, labels, teacher, reduction="none")
    got = kdfast.linear_kd_loss(
        hidden.reshape(3, 4, H), weight, labels.reshape(3, 4), teacher.reshape(3, 4, V), reduction="none"
    )
    assert torch.equal(got, flat.reshape(3, 4))


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 5])
def test_no_rows_and_all_ignored(memory, reduction, n):
    hidden, weight, bias, labels = operands(torch.float32, n=n)
    loss = kdfast.linear_kd_loss(
        hidden, weight, torch.full_like(labels, -100), torch.randn(n, V), bias=bias, memory=memory, reduction=reduction
    )
    assert torch.equal(loss.detach(), torch.zeros((n,) if reduction == "none" else ()))
    loss.sum().backward()
    for x in (hidden, weight, bias):
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_ignored_rows_may_hold_anything():
    hidden, weight, _, labels = operands(torch.float32)
    teacher, rows, _ = teacher_of("rows", 4.0)
    hidden = hidden.detach().clone()
    hidden[labels == -100] = torch.nan
    hidden.requires_grad_()
    loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, rows)
    loss.backward()
    assert loss.isfinite()
    assert weight.grad.isfinite().all()
    assert torch.equal(hidden.grad[labels == -100], torch.zeros(3, H))


def test_any_strides():
    hidden, weight, bias, labels = operands(torch.float32)
    teacher, rows, _ = teacher_of("rows", 4.0)
    strided = [torch.stack([x.detach()] * 2, -1)[..., 0].requires_grad_() for x in (hidden, weight, bias)]
    transposed = [strided[0], strided[1].detach().T.contiguous().T.requires_grad_(), strided[2]]
    assert not transposed[1].is_contiguous()
    teacher = torch.stack([teacher] * 2, -1)[..., 0]
    results = []
    for h, w, b in ((hidden, weight, bias), strided, transposed):
        loss = kdfast.linear_kd_loss(h, w, labels, teacher, rows, bias=b)
        results.append((loss.detach(), *torch.autograd.grad(loss, (h, w, b))))
    for result in results[1:]:
        for got, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, first, rtol=1e-5, atol=1e-6)


def test_gradcheck_of_the_chunk_loop():
    hidden, weight, bias, labels = operands(torch.float64)
    for memory, divergence in (("fast", "forward"), ("low", "reverse"), ("fast", "jsd")):
        teacher, rows, _ = teacher_of("hidden", 2.0)

        def loss(h, w, b, memory=memory, divergence=divergence, teacher=teacher, rows=rows):
            return kdfast.linear_kd_loss(
                h, w, labels, teacher, rows, bias=b, softcap=5.0, logit_scale=0.8, divergence=divergence,
                memory=memory, chunk=4,
            )  # fmt: skip

        assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_the_reference_takes_the_same_arguments():
    import inspect

    assert inspect.signature(linear_kd_loss_reference) == inspect.signature(kdfast.linear_kd_loss)
    hidden, weight, bias, labels = operands(torch.float64)
    teacher, rows, _ = teacher_of("rows", 4.0)

    def loss(h, w, b):
        return linear_kd_loss_reference(h, w, labels, teacher, rows, bias=b, softcap=3.0)

    assert torch.autograd.gradgradcheck(loss, (hidden, weight, bias))


def test_plain_tuples_are_teachers():
    hidden, weight, _, labels = operands(torch.float32)
    t, w, b = torch.randn(N, K), torch.randn(V, K), torch.randn(V)
    for plain in ((t, w), (t, w, b)):
        got = kdfast.linear_kd_loss(hidden, weight, labels, plain)
        assert torch.equal(got, kdfast.linear_kd_loss(hidden, weight, labels, kdfast.LinearTeacher(*plain)))
    rows = torch.randint(0, N, (N,))
    got = kdfast.linear_kd_loss(hidden, weight, labels, (t, w, b), rows)
    torch.testing.assert_close(got, kdfast.linear_kd_loss(hidden, weight, labels, t[rows] @ w.T + b))
