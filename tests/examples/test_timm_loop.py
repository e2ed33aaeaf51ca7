import pytest


def test_student_learns_with_timm_schedule():
    for package in ("torchvision", "timm"):
        # A torchvision built for another torch raises a RuntimeError.
        pytest.importorskip(package, exc_type=(ImportError, RuntimeError))
    from kdfast.examples import timm_loop

    result = timm_loop.main(epochs=5)
    assert result.losses[-1] < 0.75 * result.losses[0]
    assert result.accuracy > 0.4
    assert result.rates[-1] < 0.1 * max(result.rates), "the cosine schedule must end near 0"
