"""Newton's method: steps with float32 products end at the same optimum, and float64 takes over where they fail."""

import pytest
import torch

import kdfast
from kdfast.ops.softmax_head import data as data_module
from kdfast.ops.softmax_head import newton, solve

N, D, C, TOL = 300, 12, 5, 1e-9


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    x = torch.randn(N, D)
    return x, (x @ torch.randn(D, C) + torch.randn(N, C)).argmax(1)


@pytest.fixture
def products(monkeypatch):
    """The dtypes of the Hessian products, in their order."""
    seen = []

    class Solver(newton.HeadSolver):
        def operator(self, v):
            seen.append(self.products)
            return super().operator(v)

    monkeypatch.setattr(newton, "HeadSolver", Solver)
    monkeypatch.setattr(solve, "HeadSolver", Solver)
    return seen


def fit(rows, **options):
    return kdfast.head_newton(*rows, l2=1e-2, tol=TOL, method="cg", classes=C, **options)


@pytest.fixture
def exact(rows, monkeypatch):
    with monkeypatch.context() as only_float64:
        only_float64.setattr(newton, "FLOAT32_TOL", 1.0)
        return fit(rows)


def gradient(rows, w):
    x = torch.cat([rows[0], torch.ones(N, 1)], 1).double()
    p = (x @ w.T).softmax(1)
    return (p - torch.nn.functional.one_hot(rows[1], C)).T @ x / N + 1e-2 * w


@pytest.mark.parametrize("kept", [0, 1 << 30], ids=["logits computed", "logits kept"])
def test_float32_products_reach_the_same_optimum(rows, exact, products, kept, monkeypatch):
    monkeypatch.setattr(data_module, "_KEPT_BYTES", kept)
    found = fit(rows)
    assert gradient(rows, found).norm() <= TOL * 1.001
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    assert products[0] == torch.float32, "the first steps are loose"
    assert products[-1] == torch.float64, "the last ones are not"


def test_float64_takes_over_where_float32_fails(rows, exact, products, monkeypatch):
    monkeypatch.setattr(solve, "_FLOAT32_PRODUCTS", 1)
    found = fit(rows)
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    assert products.count(torch.float64) > products.count(torch.float32)


def test_blocks_are_read_again_for_every_product(rows, exact, products):
    x, y = rows
    blocks = [(x[:100], None, y[:100]), (x[100:], None, y[100:])]
    found = fit((blocks, None))
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    assert torch.float32 in products
