"""Seconds and bytes of a plan against numbers that are computed by hand."""

import dataclasses

import pytest

from kdfast.planning.plan import FlowPlan
from kdfast.planning.rates import Rates
from kdfast.planning.request import Amounts
from kdfast.planning.savings import paying_students
from kdfast.planning.stages import Flow, Sizes, Stage, pruned_flow, whole_flow
from kdfast.planning.table import render_plan

# 10 epochs in batches of 32: 4 batches of 100 samples, 32 of 1000.
AMOUNTS = Amounts(
    samples=1000,
    tested=200,
    kept=100,
    views=5,
    scored_views=1,
    whole=False,
    recorded_epochs=0,
    flattening=0,
    fisher=0,
    scores_network=False,
    batch_size=32,
    steps=40,
    all_steps=320,
    initial=0.0,
    online=False,
)
RATES = Rates(
    opening=0.5,
    cached=0.01,
    view=0.002,
    teacher_tested=0.004,
    trained=0.005,
    tested=0.001,
    recorded=0.003,
    flattened=0.25,
    fisher=0.02,
    scored=0.03,
    selection=2.0,
    written=1e-6,
)
SIZES = Sizes(cache=lambda samples, views: samples * (views * 20 + 40), recorded=7000, network=300, run=1000)


def parts_of(flow: Flow) -> dict[str, dict[str, float]]:
    return {stage.name: dict(stage.parts) for stage in (*flow.once, flow.each)}


def test_kept_samples() -> None:
    flow = pruned_flow(AMOUNTS, RATES, SIZES)
    assert parts_of(flow) == {
        "cache for scores": pytest.approx({"open": 0.5, "teacher": 10.0, "write": 0.06, "evaluate": 0.8}),
        "prune": pytest.approx({"open": 0.5, "select": 2.0}),
        "cache": pytest.approx({"open": 0.5, "teacher": 1.8, "write": 0.014, "evaluate": 0.8}),
        "distill": pytest.approx({"open": 0.5, "load": 0.0, "train": 5.0, "evaluate": 0.2}),
    }
    assert flow.seconds == pytest.approx(11.36 + 2.5 + 3.114 + 5.7)
    assert [stage.size for stage in flow.once] == [60_000, 800, 14_000]
    assert flow.size == 75_800


def test_all_samples_for_as_many_epochs() -> None:
    flow = whole_flow(AMOUNTS, RATES, SIZES, same_steps=False)
    assert [stage.name for stage in flow.once] == ["cache"]
    assert flow.once[0].seconds == pytest.approx(0.5 + 18.0 + 0.14 + 0.8)
    assert flow.each.parts["train"] == pytest.approx(10 * 1000 * 0.005)
    assert flow.each.work == "320 steps of 32"


def test_all_samples_for_as_many_steps() -> None:
    flow = whole_flow(AMOUNTS, RATES, SIZES, same_steps=True)
    # 40 steps of 1000 / 32 images, of which the last of an epoch has fewer.
    assert flow.each.parts["train"] == pytest.approx(40 * 31.25 * 0.005)
    assert flow.each.work == "40 steps of 32"


def test_a_cache_of_all_samples_serves_the_scores() -> None:
    amounts = dataclasses.replace(AMOUNTS, whole=True, scored_views=0)
    flow = pruned_flow(amounts, RATES, SIZES)
    assert [stage.name for stage in flow.once] == ["cache", "prune"]
    assert flow.once[0].seconds == pytest.approx(0.5 + 18.0 + 0.14 + 0.8)


def test_dynamics_flattening_and_scores_of_a_network() -> None:
    amounts = dataclasses.replace(
        AMOUNTS, scored_views=0, recorded_epochs=30, flattening=500, fisher=50, scores_network=True
    )
    parts = parts_of(pruned_flow(amounts, dataclasses.replace(RATES, loading=0.006), SIZES))
    assert parts["dynamics"] == pytest.approx({"open": 0.5, "load": 6.0, "train and record": 30 * 1000 * 0.003})
    assert parts["flatten"]["steps"] == pytest.approx(125.0)
    assert (parts["score"]["fisher"], parts["score"]["gradients"]) == pytest.approx((1.0, 30.0))


def test_terms_that_train_alone_first() -> None:
    amounts = dataclasses.replace(AMOUNTS, initial=0.25)
    flow = pruned_flow(amounts, dataclasses.replace(RATES, initial=0.009), SIZES)
    assert flow.each.parts["train"] == pytest.approx(750 * 0.005 + 250 * 0.009)


def test_a_teacher_online_is_evaluated_too() -> None:
    amounts = dataclasses.replace(AMOUNTS, views=0, scored_views=0, online=True)
    flow = pruned_flow(amounts, RATES, SIZES)
    assert [stage.name for stage in flow.once] == ["prune"]
    assert flow.each.parts["evaluate"] == pytest.approx(200 * (0.001 + 0.004))
    assert whole_flow(amounts, RATES, SIZES, same_steps=True).once == ()


def test_students_that_train_at_a_time() -> None:
    amounts = dataclasses.replace(AMOUNTS, students=5, jobs=2)
    flow = pruned_flow(amounts, RATES, SIZES)
    assert flow.seconds == pytest.approx(16.974 + 3 * 5.7)
    assert flow.size == 74_800 + 5 * 1000


def test_files_that_are_read_for_the_first_time() -> None:
    rates = dataclasses.replace(RATES, digested=0.01, summed=0.003)
    for flow in (pruned_flow(AMOUNTS, rates, SIZES), whole_flow(AMOUNTS, rates, SIZES, same_steps=True)):
        assert flow.once[0].name == "first reading"
        assert dict(flow.once[0].parts) == pytest.approx({"fingerprint": 10.0, "statistics": 3.0})


def flow_of(once: float, each: float, jobs: int = 1) -> Flow:
    return Flow((Stage("once", "", {"": once}),), Stage("each", "", {"": each}), students=jobs, jobs=jobs)


@pytest.mark.parametrize(
    ("pruned", "whole", "found"),
    [
        ((30.0, 1.0), (10.0, 5.0), (5, None)),  # 30 + n <= 10 + 5 n from n = 5 on
        ((31.0, 1.0), (10.0, 5.0), (6, None)),
        ((5.0, 1.0), (10.0, 5.0), (1, None)),
        ((30.0, 5.0), (10.0, 5.0), None),
        ((30.0, 5.0 - 1e-12), (10.0, 5.0), None),  # no number with twelve digits
        ((5.0, 5.0), (10.0, 5.0), (1, None)),
        ((5.0, 5.0 + 1e-12), (10.0, 5.0), (1, None)),
        ((5.0, 6.0), (10.0, 5.0), (1, 5)),  # 5 + 6 n <= 10 + 5 n up to n = 5
        ((5.0, 11.0), (10.0, 5.0), None),
    ],
)
def test_students_for_which_pruning_pays(
    pruned: tuple[float, float], whole: tuple[float, float], found: tuple[int, int | None] | None
) -> None:
    assert paying_students(flow_of(*pruned), flow_of(*whole)) == found


@pytest.mark.parametrize(("more", "saved"), [(10.0, 4.0), (12.0, 4.0), (1.0, 4.0), (-10.0, -4.0), (-3.0, -4.0)])
def test_students_at_a_time_for_which_pruning_pays(more: float, saved: float) -> None:
    pruned, whole = flow_of(20.0 + more, 10.0, jobs=3), flow_of(20.0, 10.0 + saved, jobs=3)
    paying = [n for n in range(1, 60) if _seconds(pruned, n) <= _seconds(whole, n)]
    least, most = paying_students(pruned, whole) or (1, 0)
    assert paying == list(range(least, 60 if most is None else most + 1))


def _seconds(flow: Flow, students: int) -> float:
    return dataclasses.replace(flow, students=students).seconds


def test_table() -> None:
    flows = [
        pruned_flow(AMOUNTS, RATES, SIZES),
        whole_flow(AMOUNTS, RATES, SIZES, same_steps=False),
        whole_flow(AMOUNTS, RATES, SIZES, same_steps=True),
    ]
    plan = FlowPlan(AMOUNTS, RATES, *flows, free=70_000, measured=15.2)
    assert render_plan(plan, lambda seconds: f"{seconds:.0f} s").splitlines() == [
        "on the kept samples                           time     writes",
        "  cache for scores   1000 samples x 1 view    11 s      60 kB",
        "  prune              100 of 1000 samples     2.5 s  800 bytes",
        "  cache              100 samples x 5 views   3.1 s      14 kB",
        "  distill            40 steps of 32          5.7 s       1 kB",
        "in all               as many epochs           23 s    75.8 kB",
        "",
        "on all samples                                time     writes",
        "  cache              1000 samples x 5 views   19 s     140 kB",
        "  distill            320 steps of 32          51 s       1 kB",
        "in all               as many epochs           70 s     141 kB",
        "  or distill         40 steps of 32          7.0 s       1 kB",
        "in all               as many steps            26 s     141 kB",
        "",
        "pruning saves 47 s of 70 s (68%) against all samples for as many epochs, and pays from 1 student on",
        "pruning saves 3.7 s of 26 s (14%) against all samples for as many steps, and pays from 1 student on",
        "",
        "measured in 15 s: teacher 500 images/s, student 200 images/s, disk 1 MB/s",
        "the disk has 70 kB free, and the kept samples need more",
    ]
