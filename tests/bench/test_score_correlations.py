"""LiSSA's recursion solves the damped system; a scale that is too small is reported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import score_correlations


def problem():
    factor = torch.randn(12, 6, dtype=torch.float64)
    return factor.T @ factor / 12, torch.randn(6, dtype=torch.float64)


def test_converges_to_the_damped_solution():
    hessian, v = problem()
    scale = 1.1 * float(torch.linalg.eigvalsh(hessian)[-1])
    found = score_correlations.lissa(lambda h: hessian @ h, v, scale, 5000)
    damped = hessian + score_correlations.DAMPING * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found, torch.linalg.solve(damped, v), rtol=1e-6, atol=1e-9)


def test_largest_eigenvalue_by_power_iteration():
    hessian, v = problem()
    found = score_correlations.largest_eigenvalue(lambda h: hessian @ h, v, steps=200)
    assert found == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6)


def test_reports_divergence():
    hessian, v = problem()
    with pytest.raises(SystemExit, match="LiSSA diverged with scale 0"):
        score_correlations.lissa(lambda h: hessian @ h, v, 1e-3, 5000)
