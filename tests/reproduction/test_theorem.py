"""The theorem's formulas against ridge regressions of scikit-learn, examples by hand, and a simulation."""

from fractions import Fraction

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from sklearn.linear_model import Ridge

from kdfast.reproduction.theorem.regression import (
    Problem,
    agreement,
    bias_map,
    counterexample,
    curves,
    measure_alignment,
    principal_angle,
    simulate,
    squared_bias,
    variance,
)

RIDGE, KEPT = 3.0, 12


def fit(samples: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.asarray(Ridge(alpha=RIDGE, fit_intercept=False, solver="svd").fit(samples, targets).coef_)


def distill(teacher: np.ndarray, labels: np.ndarray, alpha: float) -> np.ndarray:
    student = teacher[:KEPT]
    return fit(student, alpha * student @ fit(teacher, labels) + (1 - alpha) * labels[:KEPT])


def draw() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.normal(size=(30, 6)) * [3, 2, 1, 1, 0.5, 0.2], rng.normal(size=6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_bias_and_variance_are_those_of_fitted_regressions(alpha: float) -> None:
    teacher, theta = draw()
    bias = distill(teacher, teacher @ theta, alpha) - theta  # a student is linear in the labels
    assert squared_bias(teacher[:KEPT], teacher, theta, alpha, RIDGE) == pytest.approx(bias @ bias)
    responses = [distill(teacher, label, alpha) for label in np.eye(30)]
    assert variance(teacher, KEPT, alpha, RIDGE, noise=0.7) == pytest.approx(0.49 * np.sum(np.square(responses)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_simulation_agrees_with_the_formulas(alpha: float) -> None:
    teacher, theta = draw()
    noise = 0.7 * np.random.default_rng(1).normal(size=(30, 4000))
    bias, spread = simulate(teacher, KEPT, theta, alpha, RIDGE, noise)
    assert abs(bias.mean - squared_bias(teacher[:KEPT], teacher, theta, alpha, RIDGE)) < 3 * bias.error
    assert abs(spread.mean - variance(teacher, KEPT, alpha, RIDGE, noise=0.7)) < 3 * spread.error
    student = distill(teacher, teacher @ theta + noise[:, 0], alpha)
    one, _ = simulate(teacher, KEPT, theta, alpha, RIDGE, noise[:, [0, 0]])  # no spread: the estimate is the square
    assert one.mean == pytest.approx((student - theta) @ (student - theta))


def test_standard_errors_cover_the_formulas_as_often_as_they_should() -> None:
    teacher, theta = draw()
    gaps = []
    for seed in range(300):
        noise = np.random.default_rng(seed).normal(size=(30, 200))
        estimates = simulate(teacher, KEPT, theta, 0.5, RIDGE, noise)
        truth = (squared_bias(teacher[:KEPT], teacher, theta, 0.5, RIDGE), variance(teacher, KEPT, 0.5, RIDGE, 1.0))
        gaps.append([(e.mean - t) / e.error for e, t in zip(estimates, truth, strict=True)])
    assert np.std(gaps, axis=0) == pytest.approx([1, 1], abs=0.15)
    assert np.mean(gaps, axis=0) == pytest.approx([0, 0], abs=0.2)


def test_with_equal_eigenvectors_the_bias_is_that_of_each_eigenvalue_and_falls() -> None:
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0]
    values, theta, alpha = np.array([9.0, 4.0, 1.0, 0.0]), np.array([1.0, -2.0, 0.5, 3.0]), 0.6
    before = np.inf
    for growth in (1, 2, 5, 10):
        found = bias_map(basis * values @ basis.T, basis * (growth * values + 0.1) @ basis.T, alpha, RIDGE)
        a, b = values / (values + RIDGE), (growth * values + 0.1) / (growth * values + 0.1 + RIDGE)
        expected = basis @ ((1 - a * (1 - alpha * (1 - b))) * (basis.T @ theta))
        assert found @ theta == pytest.approx(expected)
        assert expected @ expected < before
        before = expected @ expected


def test_counterexample_rises_as_computed_by_hand() -> None:
    found = counterexample(4)
    # A_f = diag(4/5, 0). With one sample (1, 1), G_t + I = ((6, 1), (1, 2)), and the teacher's first weight is 6/11.
    assert found[0] == pytest.approx(float(9 + (1 - Fraction(4, 5) ** 2) ** 2))
    assert found[1] == pytest.approx(float(9 + (1 - Fraction(4, 5) * Fraction(6, 11)) ** 2))
    assert np.all(np.diff(found) > 0)


def test_principal_angle_of_rotated_planes() -> None:
    turn = np.radians(30)
    rotation = np.eye(4)
    rotation[np.ix_([0, 2], [0, 2])] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    first = np.diag([4.0, 3.0, 2.0, 1.0])
    assert principal_angle(first, rotation @ first @ rotation.T, 2) == pytest.approx(30)
    samples = np.random.default_rng(3).normal(size=(2, 9, 6))
    one, two = (s.T @ s for s in samples)
    tops = [np.linalg.svd(s)[2][:2].T for s in samples]
    assert principal_angle(one, two, 2) == pytest.approx(np.degrees(subspace_angles(*tops)).max())


def test_assumption_holds_for_large_subsets_and_fails_for_small_ones() -> None:
    problem = Problem(features=8, subsets=30, top=2)
    small, large = (measure_alignment(problem, size, seed=0) for size in (0.5, 100.0))
    assert small.independent[0] > 3 * large.independent[0]
    assert small.nested[0] > 3 * large.nested[0]
    assert (small.some_theta, small.some_step) == (1.0, 1.0)
    assert (large.some_theta, large.some_step, large.random_step) == (0.0, 0.0, 0.0)


def test_curves_fall_with_the_teachers_share_and_agree_with_the_simulation() -> None:
    points = curves(Problem(samples=400, features=8, draws=500), seed=0)
    for alpha in (0.5, 1.0):
        biases = [p.bias for p in points if p.alpha == alpha]
        assert len(biases) == 6
        assert np.all(np.diff(biases) < 0)
    assert len({p.bias for p in points if p.alpha == 0}) == 1, "without the teacher its share does not matter"
    assert all(entry["largest"] < 4 for entry in agreement(points).values())
