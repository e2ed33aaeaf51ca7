"""Norms and Hessian products of a softmax head against autograd in float64, on every backend, for CE and KD."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast.ops.softmax_head import curvature, native, residuals
from kdfast.ops.softmax_head.residuals import LossConfig

LOSSES = [(0.0, 4.0), (0.3, 4.0), (1.0, 2.0)]
SIZES = [(7, 1, 2), (40, 6, 4), (65, 33, 16), (30, 20, 17), (50, 13, 100)]


@pytest.fixture(autouse=True)
def _quiet_autograd():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture
def backend(softmax_head_backend, monkeypatch):
    """Run the test on each backend."""
    monkeypatch.setenv("KDFAST_BACKEND", f"softmax_head={softmax_head_backend}")
    return softmax_head_backend


class Head:
    """A head in float64, with gradients and products by autograd."""

    def __init__(self, n, d, c, *, bias=True, alpha=0.0, temperature=4.0, l2=0.0, scale=2.0):
        self.n, self.d, self.c, self.bias = n, d, c, bias
        self.x = torch.randn(n, d, dtype=torch.float64)
        self.y = torch.randint(0, c, (n,))
        self.t = torch.randn(n, c, dtype=torch.float64) * 3
        self.w = torch.randn(c, d + bias, dtype=torch.float64) * scale / d**0.5
        self.h = torch.cat([self.x, torch.ones(n, 1, dtype=torch.float64)], 1) if bias else self.x
        self.z = self.h @ self.w.T
        self.alpha, self.temperature, self.l2 = alpha, temperature, l2
        self.options = {"bias": bias, "alpha": alpha, "temperature": temperature}

    def losses(self, w, h=None, y=None, t=None):
        z = (self.h if h is None else h) @ w.T
        y, t = (self.y, self.t) if y is None else (y, t)
        ce = F.cross_entropy(z, y, reduction="none")
        log_p, log_q = (F.log_softmax(v / self.temperature, 1) for v in (z, t))
        return (1 - self.alpha) * ce + self.alpha * self.temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1)

    def objective(self, w):
        return self.losses(w).mean() + self.l2 / 2 * w.square().sum()

    def gradients(self):
        def one(w, h, y, t):
            return self.losses(w, h[None], y[None], t[None])[0] + self.l2 / 2 * w.square().sum()

        return torch.func.vmap(torch.func.grad(one), (None, 0, 0, 0))(self.w, self.h, self.y, self.t)

    def products(self, v):
        return torch.stack([torch.func.jvp(torch.func.grad(self.objective), (self.w,), (k,))[1] for k in v])


def relative(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def with_kernel_layout(a):
    """Copy ``a`` (n, K, C) to the memory layout of the curvature kernel."""
    return curvature.allocate_products(len(a), a[0, :, :, None]).copy_(a)


@pytest.mark.parametrize(("alpha", "temperature"), LOSSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_norms_match_autograd(backend, size, bias, alpha, temperature):
    head = Head(*size, bias=bias, alpha=alpha, temperature=temperature)
    truth = head.gradients().flatten(1).norm(dim=1)
    teacher = head.t if alpha else None
    found = kdfast.head_grad_norms(head.z, head.y, head.x, teacher=teacher, **head.options)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    single = kdfast.head_grad_norms(
        head.z.float(), head.y, head.x.float(), teacher=None if teacher is None else teacher.float(), **head.options
    )
    assert single.dtype == torch.float32
    assert relative(single, truth) < 1e-5


def test_norms_include_penalty(backend):
    head = Head(40, 6, 4, l2=0.3)
    truth = head.gradients().flatten(1).norm(dim=1)
    found = kdfast.head_grad_norms(head.z, head.y, head.x, l2=0.3, weights=head.w)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("alpha", "temperature"), LOSSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_products_match_autograd(backend, size, bias, alpha, temperature):
    head = Head(*size, bias=bias, alpha=alpha, temperature=temperature, l2=0.01)
    v = torch.randn(5, head.c, head.d + bias, dtype=torch.float64)
    truth = head.products(v)
    found = kdfast.head_hvp(head.x, head.z, v, l2=0.01, **head.options)
    assert relative(found, truth) < 1e-12
    single = kdfast.head_hvp(head.x.float(), head.z.float(), v.float(), l2=0.01, **head.options)
    assert single.dtype == torch.float32
    assert relative(single, truth) < 1e-5
    assert relative(kdfast.head_hvp(head.x, head.z, v[2], l2=0.01, **head.options), truth[2]) < 1e-12


def test_confident_samples_keep_precision(backend):
    """For p_y within rounding of 1, the residual is the sum of the other probabilities, not 1 - p_y."""
    z = torch.tensor([[30.0, 0.0, 1.0], [70.0, 0.0, -3.0]])
    x, y = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    p = z.double().softmax(1)
    r = torch.stack([-(p[:, 1] + p[:, 2]), p[:, 1], p[:, 2]], 1)
    torch.testing.assert_close(kdfast.head_grad_norms(z, y, x).double(), r.norm(dim=1) * 5**0.5, rtol=1e-5, atol=0)
    v = torch.randn(1, 3, 5)
    s = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    s[:, 0, 0] = p[:, 0] * (p[:, 1] + p[:, 2])
    for i in range(2):
        truth = (s[i] @ v[0].double() @ torch.ones(5, dtype=torch.float64))[:, None].expand(3, 5)
        assert relative(kdfast.head_hvp(x[i : i + 1], z[i : i + 1], v)[0], truth) < 1e-4


def test_huge_logits_and_probability_one(backend):
    z = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 0.0]])
    x, y = torch.ones(2, 3), torch.tensor([0, 0])
    norms = kdfast.head_grad_norms(z, y, x)
    torch.testing.assert_close(norms, torch.tensor([0.0, 8**0.5]))
    assert kdfast.head_hvp(x, z, torch.randn(3, 4)).abs().max() == 0


@pytest.mark.parametrize("tile_rows", [1, 3, 64, 1000])
def test_results_do_not_depend_on_tiles(backend, tile_rows):
    head = Head(101, 9, 5)
    v = torch.randn(3, 5, 10, dtype=torch.float64)
    norms, products = kdfast.head_grad_norms(head.z, head.y, head.x), kdfast.head_hvp(head.x, head.z, v)
    assert torch.equal(kdfast.head_grad_norms(head.z, head.y, head.x, tile_rows=tile_rows), norms)
    assert relative(kdfast.head_hvp(head.x, head.z, v, tile_rows=tile_rows), products) < 1e-14


@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_products_do_not_depend_on_number_of_vectors(backend, k):
    head = Head(60, 9, 5)
    v = torch.randn(40, 5, 10, dtype=torch.float64)
    together = kdfast.head_hvp(head.x, head.z, v)
    apart = torch.cat([kdfast.head_hvp(head.x, head.z, part) for part in v.split(k)])
    assert relative(apart, together) < 1e-14


def blocks_of(*parts, sizes=(10, 1, 0, 30, 60)):
    start = 0
    for size in sizes:
        yield tuple(part[start : start + size] for part in parts)
        start += size


def test_blocks_and_memory_maps_give_same_results(backend, tmp_path):
    head = Head(101, 9, 5)
    v = torch.randn(3, 5, 10, dtype=torch.float64)
    norms, products = kdfast.head_grad_norms(head.z, head.y, head.x), kdfast.head_hvp(head.x, head.z, v)
    maps = []
    for name, value in (("x", head.x), ("z", head.z), ("y", head.y)):
        np.save(tmp_path / f"{name}.npy", value.numpy())
        maps.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    x, z, y = maps
    assert torch.equal(kdfast.head_grad_norms(z, y, x), norms)
    assert relative(kdfast.head_hvp(x, z, v), products) < 1e-14
    assert torch.equal(kdfast.head_grad_norms(None, None, blocks_of(head.x, head.z, head.y)), norms)
    assert relative(kdfast.head_hvp(blocks_of(x, z), None, v), products) < 1e-14
    assert relative(kdfast.head_hvp(list(blocks_of(head.x, head.z)), None, v), products) < 1e-14


def test_strided_and_half_precision_features(backend):
    head = Head(50, 8, 5)
    wide = torch.randn(50, 20, dtype=torch.float64)
    wide[:, 3:11] = head.x
    torch.testing.assert_close(
        kdfast.head_grad_norms(head.z.T.contiguous().T, head.y, wide[:, 3:11]),
        kdfast.head_grad_norms(head.z, head.y, head.x),
        rtol=1e-14,
        atol=0,
    )
    half = head.x.half()
    found = kdfast.head_grad_norms(head.z.float(), head.y, half)
    torch.testing.assert_close(found, kdfast.head_grad_norms(head.z.float(), head.y, half.float()))


def test_inputs_are_unchanged_and_results_carry_no_gradient(backend):
    head = Head(20, 4, 3)
    x, z = head.x.clone().requires_grad_(), head.z.clone().requires_grad_()
    v = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    before = v.detach().clone()
    assert not kdfast.head_hvp(x, z, v, l2=0.1).requires_grad
    assert not kdfast.head_grad_norms(z, head.y, x).requires_grad
    assert torch.equal(x.detach(), head.x)
    assert torch.equal(z.detach(), head.z)
    assert torch.equal(v.detach(), before)


def test_progress_reports_rows():
    head = Head(100, 4, 3)
    calls = []
    kdfast.head_grad_norms(head.z, head.y, head.x, tile_rows=40, progress=lambda *a: calls.append(a))
    assert calls == [(40, 100, "gradient norms"), (80, 100, "gradient norms"), (100, 100, "gradient norms")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 16, 40, 1100])
def test_instruction_sets_and_threads_are_bit_equal(dtype, classes):
    head = Head(70, 21, classes)
    z, t, x = (v.to(dtype) for v in (head.z, head.t, head.x))
    a = torch.randn(70, 11, classes, dtype=dtype)
    results = []
    for level in (0, 1, 2):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            products = with_kernel_layout(a)
            native.apply_logit_hessian_(products, z, 0.3, 4.0, level)
            results.append(
                (
                    native.residuals(z, head.y, t, 0.3, 4.0, level),
                    native.norms(z, head.y, t, x, 1.0, 0.3, 4.0, level),
                    products,
                )
            )
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_matches_reference(dtype):
    for classes in (2, 9, 16, 17, 31, 33, 2050):
        head = Head(23, 3, classes)
        z, t = head.z.to(dtype), head.t.to(dtype)
        for loss in (LossConfig(0.0), LossConfig(0.4, 3.0), LossConfig(1.0, 2.0)):
            truth = residuals.reference_residuals(head.z, head.y, head.t, loss)
            tolerance = 40 * torch.finfo(dtype).eps
            assert relative(native.residuals(z, head.y, t, *loss), truth) < tolerance
            a = torch.randn(23, 3, classes, dtype=dtype)
            truth = curvature.reference_curvature_(a.double().clone(), curvature.curvature_terms(head.z, loss))
            products = with_kernel_layout(a)
            native.apply_logit_hessian_(products, z, *loss)
            assert relative(products, truth) < tolerance


def test_curvature_rejects_other_layouts():
    head = Head(23, 3, 4)
    with pytest.raises(ValueError, match="allocate_products"):
        native.apply_logit_hessian_(torch.randn(23, 2, 4, dtype=torch.float64), head.z, 0.0, 4.0)
