"""Predicted effects of removing a sample against retraining without it, for 200 samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import kdfast
from kdfast.errors import DataError
from kdfast.ops.softmax_head.data import HeadData
from kdfast.ops.softmax_head.dense_hessian import hessian, third_derivative
from kdfast.ops.softmax_head.residuals import LossConfig

N, D, C, L2 = 300, 6, 4, 1e-2
REMOVED = 200


class Fitted:
    """A head at its optimum, and the true effects of removing each of the first 200 samples."""

    def __init__(self, alpha, flipped=0):
        torch.manual_seed(1)
        options = {"dtype": torch.float64}
        self.x, self.val_x = torch.randn(N, D, **options), torch.randn(150, D, **options)
        true = torch.randn(C, D, **options)
        self.y = (self.x @ true.T + torch.randn(N, C, **options)).argmax(1)
        self.y[:flipped] = (self.y[:flipped] + 1) % C
        self.val_y = (self.val_x @ true.T + torch.randn(150, C, **options)).argmax(1)
        self.t = self.x @ true.T + torch.randn(N, C, **options)
        self.kd = {"alpha": alpha, "temperature": 2.0}
        self.teacher = self.t if alpha else None
        self.w = kdfast.head_newton(self.x, self.y, l2=L2, teacher=self.teacher, **self.kd)
        self.z, self.val_z = (kdfast.head_logits(x, self.w) for x in (self.x, self.val_x))
        self.change, self.effect = [], []
        for i in range(REMOVED):
            keep = torch.arange(N) != i
            w = kdfast.head_newton(
                self.x[keep],
                self.y[keep],
                l2=L2 * N / (N - 1),  # relative to the other losses the penalty keeps its weight with 1/N
                init=self.w,
                teacher=None if self.teacher is None else self.teacher[keep],
                **self.kd,
            )
            self.change.append(w - self.w)
            self.effect.append(self.val_loss(w) - self.val_loss(self.w))
        self.effect = torch.stack(self.effect)

    def val_loss(self, w):
        return F.cross_entropy(kdfast.head_logits(self.val_x, w), self.val_y)

    def error(self, found):
        return (found - self.effect).square().mean().sqrt()

    def influence(self, **options):
        return kdfast.head_influence(
            self.x,
            self.z,
            self.y,
            self.val_x,
            self.val_z,
            self.val_y,
            l2=L2,
            teacher=self.teacher,
            **self.kd,
            **options,
        )


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["ce", "kd"])
def fitted(request):
    return Fitted(request.param)


def test_newton_reaches_optimum(fitted):
    w = fitted.w.clone().requires_grad_()
    z = kdfast.head_logits(fitted.x, w)
    loss = kdfast.kd_loss(z, fitted.y, fitted.t, backend="reference", **fitted.kd) + L2 / 2 * w.square().sum()
    assert torch.autograd.grad(loss, w)[0].norm() <= 1e-8


def test_influence_ranks_true_removals(fitted):
    plain, corrected = fitted.influence()[:REMOVED], fitted.influence(corrected=True)[:REMOVED]
    rank, corrected_rank = (spearmanr(v, fitted.effect).statistic for v in (plain, corrected))
    assert rank >= 0.98
    assert corrected_rank >= rank
    assert fitted.error(corrected) <= 0.3 * fitted.error(plain)


def test_correction_improves_effects_of_mislabelled_samples():
    """The correction needs the third derivative: without it, effects of mislabeled samples are predicted worse."""
    fitted = Fitted(0.0, flipped=30)
    plain, corrected = fitted.influence()[:REMOVED], fitted.influence(corrected=True)[:REMOVED]
    assert fitted.error(corrected) <= 0.5 * fitted.error(plain)
    assert spearmanr(corrected, fitted.effect).statistic >= spearmanr(plain, fitted.effect).statistic


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_third_derivative_matches_differences_of_hessian(alpha, bias):
    torch.manual_seed(3)
    x, w = torch.randn(7, D, dtype=torch.float64), torch.randn(C, D + bias, dtype=torch.float64)
    u = torch.randn_like(w)
    loss = LossConfig(alpha, 2.5)

    def at(step):
        weights = w + step * u
        return hessian(HeadData(x, kdfast.head_logits(x, weights), bias=bias), 0.1, loss)

    step = 1e-5
    found = third_derivative(HeadData(x, kdfast.head_logits(x, w), bias=bias, tile_rows=3), u, loss)
    torch.testing.assert_close(found, (at(step) - at(-step)) / (2 * step), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
def test_single_row_tiles_give_same_result(fitted, corrected):
    args, options = (fitted.x, fitted.z, fitted.y), {"teacher": fitted.teacher, "corrected": corrected, **fitted.kd}
    together = kdfast.head_leave_one_out(*args, torch.tensor([0, 3, 299]), l2=L2, **options)
    for i, row in enumerate((0, 3, 299)):
        alone = kdfast.head_leave_one_out(*args, torch.tensor([row]), l2=L2, **options)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-14)
    for tile_rows in (1, N - 1):
        options["tile_rows"] = tile_rows
        own = kdfast.head_self_influence(*args, l2=L2, **options)
        options["tile_rows"] = None
        torch.testing.assert_close(own, kdfast.head_self_influence(*args, l2=L2, **options), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(
        fitted.influence(corrected=corrected, tile_rows=N - 1), fitted.influence(corrected=corrected)
    )


def test_positive_influence_means_helpful(fitted):
    best = fitted.influence()[:REMOVED].argmax()
    assert fitted.effect[best] > 0


def test_influence_matches_formula(fitted):
    w = fitted.w.clone().requires_grad_()
    h = torch.cat([fitted.x, torch.ones(N, 1, dtype=torch.float64)], 1)
    g_val = torch.autograd.grad(fitted.val_loss(w), w)[0].detach()
    solved = kdfast.head_solve(fitted.x, fitted.z, g_val, l2=L2, tol=1e-12, **fitted.kd)
    truth = []
    for i in range(20):
        z = h[i : i + 1] @ w.T
        loss = kdfast.kd_loss(z, fitted.y[i : i + 1], fitted.t[i : i + 1], backend="reference", **fitted.kd)
        truth.append((torch.autograd.grad(loss, w)[0] * solved).sum() / N)
    torch.testing.assert_close(fitted.influence(tol=1e-12)[:20], torch.stack(truth), rtol=1e-9, atol=1e-15)


def test_influence_does_not_depend_on_method_tiles_or_blocks(fitted):
    truth = fitted.influence(tol=1e-11)
    for options in ({"method": "cg"}, {"tile_rows": 7}, {"method": "cg", "tile_rows": 64}):
        torch.testing.assert_close(fitted.influence(tol=1e-11, **options), truth, rtol=1e-7, atol=1e-13)
    if fitted.teacher is None:
        blocks = [(fitted.x[:99], fitted.z[:99], fitted.y[:99]), (fitted.x[99:], fitted.z[99:], fitted.y[99:])]
        val = [(fitted.val_x, fitted.val_z, fitted.val_y)]
        found = kdfast.head_influence(blocks, None, None, val, None, None, l2=L2, tol=1e-11)
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("corrected", [False, True])
def test_leave_one_out_matches_retrained_weights(fitted, corrected):
    rows = torch.arange(REMOVED)
    change = kdfast.head_leave_one_out(
        fitted.x, fitted.z, fitted.y, rows, l2=L2, corrected=corrected, teacher=fitted.teacher, **fitted.kd
    )
    truth = torch.stack(fitted.change)
    error = (change - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    assert error.mean() < (0.02 if corrected else 0.1)
    assert change.shape == (REMOVED, C, D + 1)


@pytest.mark.parametrize("corrected", [False, True])
def test_self_influence_is_change_of_own_loss_by_leave_one_out(fitted, corrected):
    options = {"l2": L2, "corrected": corrected, "teacher": fitted.teacher, **fitted.kd}
    own = kdfast.head_self_influence(fitted.x, fitted.z, fitted.y, **options)
    assert (own >= 0).all()
    change = kdfast.head_leave_one_out(fitted.x, fitted.z, fitted.y, torch.arange(N), **options)
    w = fitted.w.clone().requires_grad_()
    for i in range(0, N, 37):
        z = kdfast.head_logits(fitted.x[i : i + 1], w)
        loss = kdfast.kd_loss(z, fitted.y[i : i + 1], fitted.t[i : i + 1], backend="reference", **fitted.kd)
        torch.testing.assert_close((torch.autograd.grad(loss, w)[0] * change[i]).sum(), own[i], rtol=1e-8, atol=1e-14)


def test_self_influence_by_cg_matches_cholesky(fitted):
    options = {"l2": L2, "teacher": fitted.teacher, "tol": 1e-10, **fitted.kd}
    few = slice(0, 50)
    teacher = None if fitted.teacher is None else fitted.teacher[few]
    args = (fitted.x[few], fitted.z[few], fitted.y[few])
    options["teacher"] = teacher
    torch.testing.assert_close(
        kdfast.head_self_influence(*args, method="cg", **options), kdfast.head_self_influence(*args, **options)
    )


def test_scores_find_flipped_labels():
    from sklearn.datasets import load_digits
    from sklearn.metrics import roc_auc_score

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    flipped = torch.rand(len(y)) < 0.05
    noisy = torch.where(flipped, (y + torch.randint(1, 10, y.shape)) % 10, y)
    w = kdfast.head_newton(x, noisy, l2=1e-3)
    z = kdfast.head_logits(x, w).float()
    assert roc_auc_score(flipped, kdfast.head_self_influence(x, z, noisy, l2=1e-3)) > 0.95
    assert roc_auc_score(flipped, kdfast.head_grad_norms(z, noisy, x)) > 0.95


def test_rejects_head_that_is_its_own_teacher():
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    z = torch.randn(30, 3)
    for call in (
        lambda: kdfast.head_self_influence(x, z, y, l2=0.1, teacher=z, alpha=1.0),
        lambda: kdfast.head_influence(x, z, y, x, z, y, l2=0.1, teacher=z, alpha=1.0),
        lambda: kdfast.head_grad_norms(z, y, x, teacher=z, alpha=1.0),
    ):
        with pytest.raises(DataError, match="every gradient is zero: with alpha = 1"):
            call()
    mixed = kdfast.head_grad_norms(z, y, x, teacher=z, alpha=0.5)
    torch.testing.assert_close(mixed, 0.5 * kdfast.head_grad_norms(z, y, x))
