"""Solves with the Hessian of a softmax head: they reach the requested residual, or raise."""

from __future__ import annotations

import pytest
import torch

import kdfast
from kdfast.errors import ShapeError, SolveError
from kdfast.ops.conjugate_gradients import conjugate_gradients
from kdfast.ops.softmax_head.data import HeadData
from kdfast.ops.softmax_head.residuals import LossConfig
from kdfast.ops.softmax_head.solve import HeadSolver


@pytest.fixture
def head():
    x = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(0, 1.5, 12, dtype=torch.float64)
    z = torch.randn(200, 6, dtype=torch.float64) * 2
    return x, z, torch.randn(9, 6, 13, dtype=torch.float64)


def residual(x, z, b, solution, l2, **options):
    left = kdfast.head_hvp(x, z, solution.to(torch.float64), l2=l2, **options)
    return ((left - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).max()


@pytest.mark.parametrize("method", ["cholesky", "cg"])
@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_solution_reaches_tolerance(head, method, tol, alpha):
    x, z, b = head
    options = {"alpha": alpha, "temperature": 3.0}
    solution = kdfast.head_solve(x, z, b, l2=1e-3, tol=tol, method=method, **options)
    assert residual(x, z, b, solution, 1e-3, **options) <= tol * 1.01
    one = kdfast.head_solve(x, z, b[3], l2=1e-3, tol=tol, method=method, **options)
    assert one.shape == b[3].shape


def test_methods_agree_and_auto_is_cholesky_for_small_head(head):
    x, z, b = head
    found = {m: kdfast.head_solve(x, z, b, l2=1e-3, tol=1e-11, method=m) for m in ("auto", "cholesky", "cg")}
    assert torch.equal(found["auto"], found["cholesky"])
    torch.testing.assert_close(found["cg"], found["cholesky"], rtol=1e-6, atol=1e-8)


def test_auto_is_cg_for_large_head(monkeypatch, head):
    x, z, _ = head
    monkeypatch.setattr("kdfast.ops.softmax_head.solve.CHOLESKY_LIMIT", 50)
    assert HeadSolver(HeadData(x, z), 1e-3).method == "cg"


@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize("tile_rows", [None, 17, 200])
def test_solution_does_not_depend_on_partition(head, k, tile_rows):
    x, z, b = head
    options = {"l2": 1e-3, "tol": 1e-9, "method": "cg"}
    together = kdfast.head_solve(x, z, b, **options)
    apart = torch.cat([kdfast.head_solve(x, z, few, tile_rows=tile_rows, **options) for few in b.split(k)])
    torch.testing.assert_close(apart, together, rtol=1e-7, atol=1e-9)


def test_blocks_and_single_precision(head):
    x, z, b = head
    blocks = [(x[:30], z[:30]), (x[30:], z[30:])]
    whole = kdfast.head_solve(x, z, b, l2=1e-3)
    torch.testing.assert_close(kdfast.head_solve(blocks, None, b, l2=1e-3), whole, rtol=1e-8, atol=1e-10)
    single = kdfast.head_solve(x.float(), z.float(), b.float(), l2=1e-3, method="cg")
    torch.testing.assert_close(single, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_returned_solution_keeps_tolerance(head, dtype, method):
    """A solution rounded to the dtype of the right-hand side would not."""
    x, z, b = head
    b = b.to(dtype)
    found = kdfast.head_solve(x, z, b, l2=1e-4, tol=1e-9, method=method)
    assert found.dtype == torch.float64
    product = kdfast.head_hvp(x, z, found, l2=1e-4)
    assert float((product - b).flatten(1).norm(dim=1).div(b.double().flatten(1).norm(dim=1)).max()) <= 1.1e-9


def test_preconditioner_saves_iterations(head):
    x, z, b = head
    solver = HeadSolver(HeadData(x, z), 1e-3, LossConfig(), method="cg", tol=1e-8)
    plain = conjugate_gradients(solver.operator, b, tol=1e-8)
    assert solver.solve(b).iterations < plain.iterations / 3
    assert solver.solve(b).method == "cg"
    assert (solver.solve(b).residuals <= 1e-8).all()


def test_exact_preconditioner_needs_one_step():
    """For equal samples the Hessian is the Kronecker product that the preconditioner inverts."""
    x, z = torch.ones(50, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64).expand(50, 3)
    solver = HeadSolver(HeadData(x, z), 0.1, method="cg", tol=1e-10)
    assert solver.solve(torch.randn(2, 3, 5, dtype=torch.float64)).iterations == 1


def test_unreached_tolerance_raises(head):
    x, z, b = head
    with pytest.raises(SolveError, match=r"relative residual of .* after 2 products, `tol` is 1\.0e-10"):
        kdfast.head_solve(x, z, b, l2=1e-3, tol=1e-10, method="cg", max_iterations=2)
    with pytest.raises(SolveError, match=r"`tol` is 1\.0e-30"):
        kdfast.head_solve(x, z, b, l2=1e-3, tol=1e-30, method="cholesky")


@pytest.mark.parametrize("l2", [0.0, -1e-3, float("nan"), float("inf")])
def test_rejects_singular_hessian(head, l2):
    x, z, b = head
    for call in (
        lambda: kdfast.head_solve(x, z, b, l2=l2),
        lambda: kdfast.head_self_influence(x, z, torch.arange(200) % 6, l2=l2),
        lambda: kdfast.head_newton(x, torch.arange(200) % 6, l2=l2),
    ):
        with pytest.raises(ShapeError, match=r"`l2` is .*must be positive and finite.*adding the same vector"):
            call()


def test_only_the_penalty_curves_the_null_direction(head):
    """Along a vector added to the weights of every class, the Hessian is l2."""
    x, z, _ = head
    b = torch.randn(13, dtype=torch.float64).expand(6, 13)
    torch.testing.assert_close(kdfast.head_solve(x, z, b, l2=0.5, method="cg"), b / 0.5, rtol=1e-5, atol=1e-6)


def spd(n):
    m = torch.randn(n, n, dtype=torch.float64)
    return m @ m.T + torch.eye(n, dtype=torch.float64)


def test_cg_accepts_any_operator():
    h, b = spd(30), torch.randn(4, 30, dtype=torch.float64)
    widths = []

    def operator(v):
        widths.append(len(v))
        return v @ h

    solution = conjugate_gradients(operator, b, tol=1e-10)
    torch.testing.assert_close(solution.x, torch.linalg.solve(h, b.T).T)
    assert max(widths) <= 4


def test_cg_drops_converged_columns():
    h = torch.diag(torch.cat([torch.ones(20), torch.logspace(0, 3, 20)]).double())
    b = torch.zeros(3, 40, dtype=torch.float64)
    b[0, 3], b[2] = 1, 1
    widths = []

    def operator(v):
        widths.append(len(v))
        return v @ h

    solution = conjugate_gradients(operator, b, tol=1e-9)
    assert widths[0] == 3
    assert widths.count(1) > 10
    assert torch.equal(solution.x[1], torch.zeros(40, dtype=torch.float64))
    alone = conjugate_gradients(operator, b[2:], tol=1e-9)
    assert torch.equal(alone.x[0], solution.x[2])


@pytest.mark.parametrize(("eigenvalue", "message"), [(-1.0, "not positive definite: add damping"), (0.0, "singular")])
def test_cg_rejects_negative_or_zero_curvature(eigenvalue, message):
    h = torch.diag(torch.tensor([1.0, 2.0, eigenvalue], dtype=torch.float64))
    with pytest.raises(SolveError, match=message):
        conjugate_gradients(lambda v: v @ h, torch.ones(1, 3, dtype=torch.float64))


def test_cg_in_float32_raises_if_tolerance_is_unreachable():
    h = torch.diag(torch.logspace(0, 6, 50, dtype=torch.float64)).float()
    with pytest.raises(SolveError, match="float64"):
        conjugate_gradients(lambda v: v @ h, torch.randn(2, 50), tol=1e-12)


def test_cg_rejects_bad_input():
    with pytest.raises(ShapeError, match="`tol` is 0"):
        conjugate_gradients(lambda v: v, torch.ones(1, 3), tol=0)
    with pytest.raises(ShapeError, match="at least one vector"):
        conjugate_gradients(lambda v: v, torch.ones(0, 3))
    with pytest.raises(SolveError, match="`b` is not finite"):
        conjugate_gradients(lambda v: v, torch.full((1, 3), float("nan")))
    with pytest.raises(SolveError, match="products are not finite"):
        conjugate_gradients(lambda v: v * float("nan"), torch.ones(1, 3))
