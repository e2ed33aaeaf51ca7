"""Theorem 3.1 of Ben-Baruch et al., checked on ridge regressions: a student's bias against the teacher's data.

The model is linear: labels y = X theta + noise. The teacher is a ridge regression on the labels of a share f_t of the
samples. The student is one on a share f <= f_t, a part of the teacher's samples, with the targets
alpha * teacher + (1 - alpha) * labels. With G = X^T X of a share and A = (G + ridge I)^-1 G, the expectation of the
student over the noise is A_f (alpha A_t + (1 - alpha) I) theta. The theorem says that its bias falls as f_t grows. The
proof takes the eigenvectors of G_f and G_t as equal; then the bias along the i-th of them is
theta_i (1 - a_i (1 - alpha (1 - a'_i))), with a and a' the eigenvalues of A_f and A_t, and a' grows with f_t.

Source: Ben-Baruch et al., "Distilling the Knowledge in Data Pruning", ICML 2025. The closed forms are derived here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ALPHAS = (0.0, 0.5, 1.0)
TEACHER_FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SAMPLES_PER_FEATURE = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_BLOCKS = 10  # the teacher's largest set, in multiples of the student's
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Problem:
    """A regression problem.

    Attributes:
        samples: Number of samples that the full data has.
        features: Number of features d; the k-th has the standard deviation k^-1/2.
        fraction: The student's share of the samples.
        ridge: Weight of the penalty, as a share of the mean eigenvalue of the student's expected Gram matrix.
        noise: Standard deviation of the labels' noise.
        draws: Number of draws of the noise in the simulation.
        subsets: Number of draws of the samples where eigenvectors are compared.
        top: Number of leading eigenvectors whose angle is measured.
    """

    samples: int = 1000
    features: int = 20
    fraction: float = 0.1
    ridge: float = 0.1
    noise: float = 1.0
    draws: int = 2000
    subsets: int = 100
    top: int = 5

    @property
    def scales(self) -> Floats:
        """Standard deviation of each feature, shape (features,)."""
        return np.arange(1, self.features + 1, dtype=np.float64) ** -0.5

    def penalty(self, samples: int) -> float:
        """Return the ridge penalty for a student with this number of samples."""
        return float(self.ridge * samples * np.mean(self.scales**2))


@dataclass(frozen=True)
class Estimate:
    """A mean over simulated noise and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Point:
    """A student: squared bias and variance of its weights, summed over the features, by formula and by simulation."""

    alpha: float
    teacher_fraction: float
    bias: float
    variance: float
    simulated_bias: Estimate
    simulated_variance: Estimate


@dataclass(frozen=True)
class Alignment:
    """How far the proof's assumption holds for one size of the student's subset, over draws of the samples.

    Attributes:
        samples_per_feature: Size of the student's subset over the number of features.
        independent: Largest principal angle, in degrees, between the leading eigenvectors of two independent subsets of
            this size: mean, smallest and largest over the draws.
        nested: The same between the subset and a teacher's set ten times as large that contains it.
        some_theta: Share of draws for which a theta exists whose bias is larger with the teacher's set ten times as
            large than with a teacher that was trained on the student's subset (alpha 1).
        some_step: Share of draws for which a theta exists whose bias rises in at least one of the nine steps between.
        random_step: Share of draws in which the bias of a random theta rises in at least one of these steps.
    """

    samples_per_feature: float
    independent: tuple[float, float, float]
    nested: tuple[float, float, float]
    some_theta: float
    some_step: float
    random_step: float


def shrinkage(gram: Floats, ridge: float) -> Floats:
    """Return A = (G + ridge I)^-1 G, which maps theta to the expectation of its ridge estimate, shape (d, d)."""
    return np.asarray(np.linalg.solve(gram + ridge * np.eye(len(gram)), gram), dtype=np.float64)


def bias_map(student_gram: Floats, teacher_gram: Floats, alpha: float, ridge: float) -> Floats:
    """Return I - A_f (alpha A_t + (1 - alpha) I), which maps theta to minus the student's bias, shape (d, d)."""
    identity = np.eye(len(student_gram))
    targets = alpha * shrinkage(teacher_gram, ridge) + (1 - alpha) * identity
    return identity - shrinkage(student_gram, ridge) @ targets


def squared_bias(student: Floats, teacher: Floats, theta: Floats, alpha: float, ridge: float) -> float:
    """Return the squared norm of the student's bias.

    Args:
        student: Samples of the student, shape (n, d).
        teacher: Samples of the teacher, shape (m, d); of any relation to those of the student.
        theta: True weights, shape (d,).
        alpha: Weight of the teacher's predictions in the student's targets.
        ridge: Penalty of both regressions.
    """
    bias = bias_map(student.T @ student, teacher.T @ teacher, alpha, ridge) @ theta
    return float(bias @ bias)


def variance(teacher: Floats, kept: int, alpha: float, ridge: float, noise: float) -> float:
    """Return the student's variance, summed over its weights.

    Args:
        teacher: Samples of the teacher, shape (m, d).
        kept: Number of samples of the student: the first ones of the teacher, with the same labels.
        alpha: Weight of the teacher's predictions in the student's targets.
        ridge: Penalty of both regressions.
        noise: Standard deviation of the labels' noise.
    """
    student, identity = teacher[:kept], np.eye(teacher.shape[1])
    from_labels = np.linalg.solve(student.T @ student + ridge * identity, student.T)
    from_teacher = np.linalg.solve(teacher.T @ teacher + ridge * identity, teacher.T)
    response = alpha * from_labels @ student @ from_teacher
    response[:, :kept] += (1 - alpha) * from_labels
    return float(noise**2 * np.sum(response**2))


def simulate(
    teacher: Floats, kept: int, theta: Floats, alpha: float, ridge: float, noise: Floats
) -> tuple[Estimate, Estimate]:
    """Fit teacher and student for every draw of the noise, and estimate the student's squared bias and its variance.

    Args:
        teacher: Samples of the teacher, shape (m, d).
        kept: Number of samples of the student: the first ones of the teacher.
        theta: True weights, shape (d,).
        alpha: Weight of the teacher's predictions in the student's targets.
        ridge: Penalty of both regressions.
        noise: Noise of the teacher's labels, shape (m, draws).

    Returns:
        Unbiased estimates of the squared bias and of the variance, summed over the weights.
    """
    draws = noise.shape[1]
    labels = (teacher @ theta)[:, None] + noise
    weights = _fit(teacher, labels, ridge)
    targets = alpha * (teacher[:kept] @ weights) + (1 - alpha) * labels[:kept]
    errors = _fit(teacher[:kept], targets, ridge) - theta[:, None]
    mean = errors.mean(axis=1)
    deviations = errors - mean[:, None]
    spread = np.sum(deviations**2, axis=0) * draws / (draws - 1)
    covariance = np.cov(errors)
    # Of |mean|^2, whose expectation is the squared bias plus a draws-th of the variance.
    bias_error = np.sqrt(4 * mean @ covariance @ mean / draws + 2 * np.sum(covariance**2) / draws**2)
    return (
        Estimate(float(mean @ mean - spread.mean() / draws), float(bias_error)),
        Estimate(float(spread.mean()), float(spread.std(ddof=1) / np.sqrt(draws))),
    )


def principal_angle(first: Floats, second: Floats, top: int) -> float:
    """Return the largest principal angle, in degrees, between the spans of the leading eigenvectors of two matrices.

    Args:
        first: Symmetric matrix, shape (d, d).
        second: Symmetric matrix, shape (d, d).
        top: Number of leading eigenvectors of each.
    """
    bases = [np.linalg.eigh(matrix)[1][:, -top:] for matrix in (first, second)]
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float(np.degrees(np.arccos(min(1.0, cosines[-1]))))


def curves(problem: Problem, seed: int) -> list[Point]:
    """Return the students of every alpha and every teacher's fraction, on one draw of the samples."""
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(problem.samples, problem.features)) * problem.scales
    theta = _unit(rng.normal(size=problem.features))
    noise = problem.noise * rng.normal(size=(problem.samples, problem.draws))
    kept = round(problem.fraction * problem.samples)
    ridge = problem.penalty(kept)
    points = []
    for alpha in ALPHAS:
        for fraction in TEACHER_FRACTIONS:
            teacher = design[: round(fraction * problem.samples)]
            simulated = simulate(teacher, kept, theta, alpha, ridge, noise[: len(teacher)])
            bias = squared_bias(design[:kept], teacher, theta, alpha, ridge)
            spread = variance(teacher, kept, alpha, ridge, problem.noise)
            points.append(Point(alpha, fraction, bias, spread, *simulated))
    return points


def measure_alignment(problem: Problem, samples_per_feature: float, seed: int) -> Alignment:
    """Measure how far the proof's assumption, and what the theorem says, hold for one size of the student's subset."""
    rng = np.random.default_rng((seed, round(100 * samples_per_feature)))
    size, d = max(1, round(samples_per_feature * problem.features)), problem.features
    ridge = problem.penalty(size)
    independent, nested, rises = [], [], []
    for _ in range(problem.subsets):
        design = rng.normal(size=(_BLOCKS, size, d)) * problem.scales
        blocks = design.transpose(0, 2, 1) @ design
        grams = np.cumsum(blocks, axis=0)
        independent.append(principal_angle(blocks[0], blocks[1], problem.top))
        nested.append(principal_angle(blocks[0], grams[-1], problem.top))
        maps = [bias_map(blocks[0], gram, 1.0, ridge) for gram in grams]
        rises.append(_rises([one.T @ one for one in maps], _unit(rng.normal(size=d))))
    shares = np.mean(rises, axis=0)
    return Alignment(samples_per_feature, _range(independent), _range(nested), *map(float, shares))


def counterexample(extra: int) -> list[float]:
    """Return the squared bias of a student whose teacher sees more and more data: it rises with every sample.

    Two features, ridge 1, alpha 1, theta (1, -3). The student has the one sample (2, 0); its teacher has this one and 0
    to `extra` samples (1, 1), so that the eigenvectors of the two Gram matrices differ.
    """
    student, theta = np.array([[2.0, 0.0]]), np.array([1.0, -3.0])
    return [
        squared_bias(student, np.vstack([student, np.ones((count, 2))]), theta, alpha=1.0, ridge=1.0)
        for count in range(extra + 1)
    ]


def agreement(points: list[Point]) -> dict[str, Any]:
    """Return how many standard errors the simulation lies from the formulas, at most and as the root mean square."""
    gaps = {
        "bias": [(p.simulated_bias.mean - p.bias) / p.simulated_bias.error for p in points],
        "variance": [(p.simulated_variance.mean - p.variance) / p.simulated_variance.error for p in points],
    }
    return {
        name: {"largest": max(map(abs, values)), "root_mean_square": float(np.sqrt(np.mean(np.square(values))))}
        for name, values in gaps.items()
    }


def _rises(squares: list[Floats], theta: Floats) -> tuple[bool, bool, bool]:
    """Return whether the bias rises from first to last for some theta, in a step for some theta, in one for theta."""
    steps = [after - before for before, after in itertools.pairwise(squares)]
    return (
        _largest(squares[-1] - squares[0]) > _TOLERANCE,
        any(_largest(step) > _TOLERANCE for step in steps),
        any(theta @ step @ theta > _TOLERANCE for step in steps),
    )


def _largest(matrix: Floats) -> float:
    return float(np.linalg.eigvalsh(matrix)[-1])


def _fit(samples: Floats, targets: Floats, ridge: float) -> Floats:
    """Return the weights of a ridge regression for every column of the targets, shape (d, columns)."""
    gram = samples.T @ samples + ridge * np.eye(samples.shape[1])
    return np.asarray(np.linalg.solve(gram, samples.T @ targets), dtype=np.float64)


def _unit(vector: Floats) -> Floats:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float64)


def _range(values: list[float]) -> tuple[float, float, float]:
    return float(np.mean(values)), min(values), max(values)
