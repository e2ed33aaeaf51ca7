"""What is counted of repeated work, with a clock that only the work moves."""

from types import SimpleNamespace

import pytest

from kdfast.planning import timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def work(clock: SimpleNamespace, durations: list[float]):
    calls = iter(durations)

    def measure() -> float:
        seconds = next(calls)
        clock.now += seconds
        return seconds

    return measure


def test_discards_the_first_fifth_of_the_time(clock: SimpleNamespace) -> None:
    # The first two calls end after 1.5 and 2.0 of 10 seconds, and are discarded; the last ends at 10.
    measure = work(clock, [1.5, 0.5, 1.0, 3.0, 4.0, 99.0])
    assert timing.mean_seconds(measure, 10.0) == pytest.approx(8 / 3)


def test_two_calls_are_made_of_slow_work(clock: SimpleNamespace) -> None:
    assert timing.mean_seconds(work(clock, [30.0, 20.0, 99.0]), 10.0) == 20.0


def test_a_stopwatch_discards_the_work_before_the_first_report(clock: SimpleNamespace) -> None:
    watch = timing.Stopwatch(10.0)
    reports = [(7.0, 2), (8.0, 4), (9.5, 6)]
    for clock.now, done in reports:
        watch(done, 100, "")
    assert watch.seconds_per_unit == pytest.approx(2.5 / 4)
    clock.now = 12.0
    with pytest.raises(timing.Enough):
        watch(10, 100, "")
    assert (watch.seconds_per_unit, watch.total) == (pytest.approx(5 / 8), 100)


def test_a_stopwatch_waits_for_a_second_report(clock: SimpleNamespace) -> None:
    watch = timing.Stopwatch(10.0)
    clock.now = 50.0
    watch(1, 2, "")
    assert watch.seconds_per_unit is None
