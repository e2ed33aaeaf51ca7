"""Targets of the named losses: a teacher's rows, top-k teachers, ignored samples and soft labels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast

N, CLASSES = 6, 5
TEACHER = torch.randn(4, CLASSES, dtype=torch.float64)
ROWS = torch.tensor([3, 0, 1, 1, 2, 0])


@pytest.fixture
def case():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    return model, torch.randn(N, 3, dtype=torch.float64), torch.randint(0, CLASSES, (N,))


def norms(model, losses):
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([sum(g.square().sum() for g in each).sqrt() for each in grads])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 3, CLASSES, None])
@pytest.mark.parametrize("rows", [ROWS, None])
def test_teachers_match_kd_loss(case, k, rows, alpha):
    model, x, y = case
    teacher = TEACHER if rows is not None else TEACHER[ROWS]
    teacher = teacher if k is None else kdfast.topk_teacher(teacher, k, 2.0)
    options = {"alpha": alpha, "temperature": 2.0}
    losses = kdfast.kd_loss(model(x), y, teacher, rows, reduction="none", backend="reference", **options)
    found = kdfast.grad_norms(model, x, y, loss="kd", teacher=teacher, rows=rows, **options)
    torch.testing.assert_close(found, norms(model, losses), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("loss", ["cross_entropy", "kd", "top-k"])
def test_ignored_samples_have_norm_zero(case, loss, ignored):
    model, x, y = case
    y = torch.where(torch.arange(N) % 2 == 0, ignored, y)
    teacher = kdfast.topk_teacher(TEACHER, 2, 4.0) if loss == "top-k" else TEACHER
    kd = {} if loss == "cross_entropy" else {"teacher": teacher, "rows": ROWS}
    found = kdfast.grad_norms(model, x, y, loss="kd" if kd else loss, ignore_index=ignored, **kd)
    keep = y != ignored
    assert bool((found[~keep] == 0).all())
    kd = kd and {**kd, "rows": ROWS[keep]}
    exact = kdfast.grad_norms(model, x[keep], y[keep], loss="kd" if kd else loss, ignore_index=-1, **kd)
    assert bool(exact.all())
    torch.testing.assert_close(found[keep], exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize("fallback", ["error", "loop"])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.4])
def test_soft_labels_match_autograd(case, alpha, fallback):
    model, x, _ = case
    y = torch.rand(N, CLASSES, dtype=torch.float64)
    losses = F.cross_entropy(model(x), y, reduction="none")
    options = {}
    if alpha is not None:
        options = {"loss": "kd", "teacher": TEACHER, "rows": ROWS, "alpha": alpha, "temperature": 2.0}
        kd = kdfast.kd_loss(model(x), None, TEACHER, ROWS, alpha=1.0, temperature=2.0, reduction="none")
        losses = (1 - alpha) * losses + alpha * kd
    found = kdfast.grad_norms(model, x, y, fallback=fallback, **options)
    torch.testing.assert_close(found, norms(model, losses), rtol=1e-6, atol=0)


@pytest.mark.parametrize("margin", [20.0, 60.0])
def test_one_hot_probabilities_keep_the_precision_of_class_ids(margin):
    layer = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[margin, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    found = kdfast.grad_norms(layer, x, F.one_hot(y, 3).float())
    torch.testing.assert_close(found, kdfast.grad_norms(layer, x, y), rtol=1e-6, atol=0)
    assert float(found) > 0
