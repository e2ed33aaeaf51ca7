"""Soft labels, class weights, teacher probabilities and leading dimensions of `kd_loss`, against PyTorch's losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast.errors import ShapeError

N, C = 9, 14
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def case(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, t = (2 * torch.randn(N, C, generator=g, dtype=torch.float64) for _ in range(2))
    soft = torch.rand(N, C, generator=g, dtype=torch.float64)
    soft[:, 3] = 0
    return z.to(dtype).requires_grad_(), t, soft / soft.sum(1, keepdim=True), torch.randint(0, C, (N,), generator=g)


def compare(loss, z, truth):
    """Compare a loss and its gradient with those of a float64 function of the logits."""
    exact = z.detach().double().requires_grad_()
    expected = truth(exact)
    up = torch.rand_like(loss)
    (grad,), (of_truth,) = torch.autograd.grad(loss, z, up), torch.autograd.grad(expected, exact, up.double())
    tolerance, of_loss = ROUNDING[z.dtype], 1e-12 if z.dtype == torch.float64 else 1e-6
    assert (loss.double() - expected).norm() <= max(tolerance, of_loss) * expected.norm()
    assert (grad.double() - of_truth).norm() <= tolerance * of_truth.norm()


def kl(z, t, temperature):
    p, q = F.log_softmax(z / temperature, 1), F.log_softmax(t / temperature, 1)
    return temperature**2 * (q.exp() * (q - p)).sum(1)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_labels(dtype, alpha, smoothing, reduction):
    z, t, soft, _ = case(dtype)
    weights = torch.rand(N, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    loss = kdfast.kd_loss(
        z, soft, t, alpha=alpha, temperature=2.0, weights=weights, label_smoothing=smoothing, reduction=reduction
    )

    def truth(z):
        ce = F.cross_entropy(z, soft, reduction="none", label_smoothing=smoothing)
        rows = ((1 - alpha) * ce + alpha * kl(z, t, 2.0)) * weights.double()
        return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / weights.double().sum()}[reduction]

    compare(loss, z, truth)


def test_soft_labels_of_one_class_are_classes():
    z, t, _, labels = case(torch.float32)
    onehot = F.one_hot(labels, C).float()
    for options in ({}, {"direction": "reverse"}, {"divergence": "jsd"}, {"alpha": torch.rand(N)}):
        soft = kdfast.kd_loss(z, onehot, t, **options)
        torch.testing.assert_close(soft, kdfast.kd_loss(z, labels, t, **options), rtol=1e-5, atol=1e-6)
    hard_terms, soft_terms = (kdfast.kd_loss_terms(z, y, t) for y in (labels, onehot))
    torch.testing.assert_close(hard_terms, soft_terms, rtol=1e-5, atol=1e-6)


def test_soft_labels_leave_out_a_term_of_weight_0_even_if_it_is_infinite():
    z, t, soft, _ = case(torch.float32)
    t[0, 4] = -torch.inf  # KL(student || teacher) of row 0 is infinite
    masked = torch.zeros(N, C)
    masked[1, 0] = -torch.inf  # and so is the cross-entropy of row 1
    alpha = torch.tensor([0.0, 1.0] + [0.5] * (N - 2))
    losses = {}
    for backend in ("native", "reference"):
        loss = kdfast.kd_loss(z + masked, soft, t, alpha=alpha, direction="reverse", reduction="none", backend=backend)
        losses[backend] = torch.cat([loss.unsqueeze(1), torch.autograd.grad(loss.sum(), z)[0]], 1)
    assert losses["native"].isfinite().all()
    torch.testing.assert_close(losses["native"], losses["reference"], rtol=1e-5, atol=1e-6)


def test_soft_labels_need_no_unit_sum():
    z, t, soft, _ = case(torch.float32)
    scaled = (soft * torch.rand(N, 1)).float()
    compare(kdfast.kd_loss(z, scaled, t, alpha=0.0), z, lambda z: F.cross_entropy(z, scaled.double()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_class_weights(dtype, reduction, soft):
    z, t, probabilities, labels = case(dtype)
    class_weights = torch.rand(C)
    class_weights[labels[0]] = 0
    if not soft:
        labels[2] = -100
    y = probabilities if soft else labels
    loss = kdfast.kd_loss(z, y, t, alpha=0.3, temperature=2.0, class_weights=class_weights, reduction=reduction)

    def truth(z):
        rows = 0.7 * F.cross_entropy(z, y, class_weights.double(), reduction="none") + 0.3 * kl(z, t, 2.0)
        rows = rows if soft else torch.where(labels == -100, 0, rows)
        count = N if soft else N - 1
        return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / count}[reduction]

    compare(loss, z, truth)


@pytest.mark.parametrize("alpha", [-0.5, 1.5, float("nan")])
def test_class_weights_do_not_hide_an_alpha_out_of_range(alpha):
    z, t, _, labels = case(torch.float32)
    alphas = torch.full((N,), 0.5)
    alphas[3] = alpha
    class_weights = torch.full((C,), 0.2)
    message = rf"`alpha\[3\]` is {alpha:g}: must be in \[0, 1\]"
    with pytest.raises(ShapeError, match=message):
        kdfast.kd_loss(z, labels, t, alpha=alphas, class_weights=class_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_teacher_kinds(dtype):
    z, t, _, labels = case(dtype)
    rows = torch.randint(0, N, (N,))
    t[0, 4] = -torch.inf  # a masked class has probability zero
    expected = kdfast.kd_loss(z, labels, t, rows)
    for kind, teacher in (("logprobs", t.log_softmax(1)), ("probs", t.softmax(1)), ("probs", t.softmax(1).float())):
        got = kdfast.kd_loss(z, labels, teacher, rows, teacher_kind=kind)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_leading_dimensions():
    z, t, soft, labels = case(torch.float32)
    grid = (3, 3)
    weights, alpha, temperature = torch.rand(N), torch.rand(N), torch.rand(N) + 1
    topk = kdfast.topk_teacher(t, 4, 2.0)
    shaped_topk = kdfast.TopKTeacher(*(x.reshape(*grid, *x.shape[1:]) for x in topk))
    shaped = {"weights": weights.reshape(grid), "alpha": alpha.reshape(grid), "temperature": temperature.reshape(grid)}
    flat = {"weights": weights, "alpha": alpha, "temperature": temperature}
    for teacher, of_grid in ((t, t.reshape(*grid, C)), (topk, shaped_topk)):
        for y, y_of_grid in ((labels, labels.reshape(grid)), (soft, soft.reshape(*grid, C))):
            for reduction in ("none", "mean"):
                expected = kdfast.kd_loss(z, y, teacher, reduction=reduction, **flat)
                got = kdfast.kd_loss(z.reshape(*grid, C), y_of_grid, of_grid, reduction=reduction, **shaped)
                assert torch.equal(got, expected.reshape(grid) if reduction == "none" else expected)
    rows = torch.randint(0, N, grid)
    expected = kdfast.kd_loss(z, labels, t, rows.flatten())
    assert torch.equal(kdfast.kd_loss(z.reshape(*grid, C), labels.reshape(grid), t, rows), expected)


BAD = {
    "soft labels of other classes": (
        {"labels": torch.rand(N, C + 1)},
        r"`labels` are probabilities of shape \(9, 15\)",
    ),
    "logits as labels": ({"labels": torch.full((N, C), -1.0)}, r"`labels\[0, 0\]` is -1: pass probabilities"),
    "dkd": ({"labels": torch.rand(N, C), "divergence": "dkd"}, "needs one class per row"),
    "weights of other classes": ({"class_weights": torch.ones(C - 1)}, r"`class_weights` has shape \(13,\)"),
    "negative class weight": ({"class_weights": -torch.ones(C)}, r"`class_weights\[0\]` is -1"),
    "smoothing": ({"class_weights": torch.ones(C), "label_smoothing": 0.1}, "does not go with `class_weights`"),
    "kind": ({"teacher_kind": "log"}, "`teacher_kind` is 'log'"),
    "logits as probabilities": ({"teacher_kind": "probs"}, r"`teacher\[0, \d+\]` is -.*pass probabilities"),
    "other grid": (
        {"logits": torch.randn(3, 3, C), "labels": torch.zeros(9, 1, dtype=torch.int64)},
        r"must be \(3, 3\)",
    ),
}


def test_a_bad_probability_is_named_by_the_row_of_the_teacher():
    z, _, soft, labels = case(torch.float32)
    soft[7, 2] = float("nan")
    with pytest.raises(ShapeError, match=r"`teacher\[7, 2\]` is nan: pass probabilities"):
        kdfast.kd_loss(z, labels, soft, torch.full((N,), 7), teacher_kind="probs")
    kdfast.kd_loss(z, labels, soft, torch.zeros(N, dtype=torch.int64), teacher_kind="probs")


@pytest.mark.parametrize("name", BAD)
def test_rejected(name):
    changes, message = BAD[name]
    arguments = {"logits": torch.randn(N, C), "labels": torch.zeros(N, dtype=torch.int64), "teacher": torch.randn(N, C)}
    with pytest.raises(ShapeError, match=message):
        kdfast.kd_loss(**{**arguments, **changes})
