import math
from itertools import pairwise

import pytest

from kdfast.distillation.losses.alpha import compute_alpha, parse_alpha
from kdfast.distillation.recipe.optimizer import LR_SCHEDULES, compute_learning_rate, step_decay
from kdfast.errors import UsageError


@pytest.mark.parametrize(
    ("fraction", "alpha"), [(0.01, 1.0), (0.1, 1.0), (0.25, 0.875), (0.4, 0.75), (0.7, 0.5), (1.0, 0.5)]
)
def test_alpha_interpolates_between_its_anchors(fraction: float, alpha: float) -> None:
    assert compute_alpha(fraction) == pytest.approx(alpha)


def test_alpha_never_grows_with_the_fraction() -> None:
    alphas = [compute_alpha(i / 100) for i in range(1, 101)]
    assert all(a >= b for a, b in pairwise(alphas))
    assert len(set(alphas)) > 50


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, math.nan])
def test_alpha_rejects_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"\(0, 1\]"):
        compute_alpha(fraction)


@pytest.mark.parametrize("text", ["-0.1", "1.5", "nan", "inf", "half", ""])
def test_parse_alpha_rejects_other_text(text: str) -> None:
    with pytest.raises(UsageError, match="`alpha` is"):
        parse_alpha(text, 0.1)


def test_parse_alpha_accepts_numbers_and_auto() -> None:
    assert parse_alpha("0.3", 0.1) == 0.3
    assert parse_alpha("auto", 0.1) == 1.0


def test_step_decay_drops_at_epochs_150_180_210_of_240() -> None:
    factors = [step_decay(epoch / 240) for epoch in range(240)]
    drops = [epoch for epoch in range(1, 240) if factors[epoch] < factors[epoch - 1]]
    assert drops == [150, 180, 210]
    assert factors[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("schedule", sorted(LR_SCHEDULES))
def test_learning_rate_warms_up_then_never_rises(schedule: str) -> None:
    rates = [compute_learning_rate(0.1, schedule, step, 100, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[9] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert all(rate > 0 for rate in rates)
