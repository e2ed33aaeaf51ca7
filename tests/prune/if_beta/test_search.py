"""The search: what it learns on planted data, that it repeats itself, goes on after a stop, and refuses bad input."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from kdfast.errors import DataError, DivergedError, OutputError, ShapeError, SubsetError, UsageError
from kdfast.prune.if_beta import IFBeta
from kdfast.prune.if_beta.gradient import Estimate, ScoreFunction
from kdfast.prune.if_beta.inner import Budget
from kdfast.prune.if_beta.proxy import PROXIES, Bottleneck, Projection
from kdfast.prune.if_beta.reward import REWARDS
from kdfast.prune.if_beta.scores import SAMPLE_SCORES, Signals, mean_logits
from kdfast.prune.if_beta.search import Schedule, SearchState, ascend, ended, result_of

QUICK = IFBeta(proxy=Projection(4), budget=Budget(steps=30, batch_size=32), schedule=Schedule(steps=6))


def fit(cloud, learner=QUICK, fraction=0.2, seed=0, **more):
    return learner.fit(cloud.logits, cloud.features, cloud.labels, fraction, seed, **{"scores": cloud.scores, **more})


def mass_above(a, b, u):
    from scipy.stats import beta

    return float(beta(a, b).sf(u))


def test_noise_in_the_top_ranks_is_avoided(noisy_top):
    found = fit(noisy_top, IFBeta(proxy=Projection(8), budget=Budget(steps=60, weight_decay=0.01)))
    assert mass_above(*found.learned, 0.8) < 0.05
    assert (found.u[found.ids] > 0.8).mean() < 0.05
    assert found.gain.difference > found.gain.half_width > 0
    assert (found.a, found.b) == found.learned


def test_uniform_is_found_where_it_is_best(two_halves):
    learner = IFBeta(proxy=Projection(2), budget=Budget(steps=60), schedule=Schedule(start=(2.5, 0.6)))
    found = fit(two_halves, learner)
    assert found.learned == pytest.approx((1, 1), abs=0.3)


def test_uniform_is_kept_where_nothing_is_better(two_halves):
    found = fit(two_halves, dataclasses.replace(QUICK, schedule=Schedule(steps=1, start=(8.0, 0.3))))
    assert (found.a, found.b) == (1.0, 1.0)
    assert found.learned != (1.0, 1.0)


@pytest.mark.slow
def test_the_search_reaches_the_best_of_a_grid(noisy_top):
    from kdfast.prune.if_beta.evaluator import Arena
    from kdfast.prune.if_beta.gradient import Trial
    from kdfast.prune.if_beta.holdout import hold_out
    from kdfast.prune.if_beta.inner import Lesson
    from kdfast.prune.if_beta.policy import Design

    learner = IFBeta(proxy=Projection(8), budget=Budget(steps=60, weight_decay=0.01))
    found = fit(noisy_top, learner)
    pool, held = hold_out(noisy_top.labels, 3)
    design = Design.of(found.u[pool], pool, noisy_top.labels[pool], round(0.2 * len(pool)))
    x = learner.proxy.inputs(noisy_top.features, 0)
    lesson = Lesson(x, torch.from_numpy(noisy_top.labels), noisy_top.logits)
    arena = Arena(learner.proxy, REWARDS["kd"], learner.budget, lesson, held, 0)
    axis, repeats = np.geomspace(0.2, 12, 15), 8

    def rewards(policies, step, draws):
        evaluate = arena.evaluator(design, step)
        outcomes = evaluate([Trial(a, b, k) for a, b in policies for k in range(draws)])
        return np.array([o.reward for o in outcomes]).reshape(len(policies), draws)

    policies = [(a, b) for a in axis for b in axis]
    best = policies[np.concatenate([rewards([p], 999, repeats) for p in policies]).mean(1).argmax()]
    # On fresh draws: the best of a grid owes part of its reward to the draws that it was picked by.
    mine, other = rewards([found.learned, best], 1234, 64)
    difference = mine - other
    assert found.trials <= 0.25 * len(policies) * repeats
    assert difference.mean() > -2 * difference.std(ddof=1) / len(difference) ** 0.5


def test_it_repeats_itself_bit_for_bit(cloud):
    one, two, other = fit(cloud), fit(cloud), fit(cloud, seed=1)
    assert one.rewards == two.rewards
    assert one.path == two.path
    np.testing.assert_array_equal(one.ids, two.ids)
    assert one.rewards != other.rewards


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_it_goes_on_after_a_stop(cloud, tmp_path, stop):
    state, whole = tmp_path / "idx.search.json", fit(cloud)

    def interrupt(done, total, note):
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(cloud, state=state, progress=interrupt)
    assert json.loads(state.read_text())["state"]["step"] == stop
    seen = []
    found = fit(cloud, state=state, progress=lambda done, total, note: seen.append((done, total)))
    assert seen == [(step, 6) for step in range(stop + 1, 7)]
    assert found.path == whole.path
    np.testing.assert_array_equal(found.ids, whole.ids)


def test_another_search_does_not_take_the_state_over(cloud, tmp_path):
    state = tmp_path / "idx.search.json"
    fit(cloud, state=state)
    for change in (
        {"fraction": 0.3},
        {"seed": 1},
        {"scores": -cloud.scores},
        {"learner": IFBeta(schedule=Schedule(3))},
    ):
        with pytest.raises(OutputError, match="other data or settings"):
            fit(cloud, state=state, **change)
    state.write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="is no interrupted search"):
        fit(cloud, state=state)
    state.write_text("not json")
    with pytest.raises(OutputError, match="not valid JSON"):
        fit(cloud, state=state)


def test_rewards_that_are_not_finite_stop_the_search_and_lose_nothing(cloud, tmp_path):
    calls, state = [], tmp_path / "idx.search.json"

    def breaks(logits, labels, teacher, temperature):
        calls.append(1)
        return torch.full((len(labels),), torch.nan) if len(calls) > 20 else torch.zeros(len(labels)) + logits.mean()

    breaks.identity = "breaks"
    with pytest.raises(DivergedError, match=r"step 2 at a = .* not finite"):
        fit(cloud, dataclasses.replace(QUICK, reward=breaks), state=state)
    assert json.loads(state.read_text())["state"]["step"] == 2


@pytest.mark.parametrize("candidates", [1, 3])
def test_rewards_of_the_final_draws_that_are_not_finite_are_refused(cloud, candidates):
    calls = []
    learner = dataclasses.replace(QUICK, schedule=Schedule(steps=1), candidates=candidates)
    fit(cloud, dataclasses.replace(learner, reward=lambda z, y, t, temperature: calls.append(1) or z.sum(1)))
    # The comparison judges 32 proxies, the candidates come last.
    fine = len(calls) - (candidates if candidates > 1 else 32)
    calls.clear()

    def breaks(logits, labels, teacher, temperature):
        calls.append(1)
        return logits.sum(1) * (torch.nan if len(calls) > fine else 1.0)

    with pytest.raises(DivergedError, match="final draws is not finite"):
        fit(cloud, dataclasses.replace(learner, reward=breaks))


def test_a_part_that_cannot_be_told_from_another_keeps_no_state(cloud, tmp_path):
    def scaled(scale):
        def reward(logits, labels, teacher, temperature):
            return scale * REWARDS["kd"](logits, labels, teacher, temperature)

        return reward

    state = tmp_path / "s.json"
    for part in (scaled(1.0), lambda z, y, t, temperature: z.sum(1)):
        with pytest.raises(UsageError, match=r"the reward .* cannot be told from another"):
            fit(cloud, dataclasses.replace(QUICK, reward=part), state=state)
        assert not state.exists()
    one, other = scaled(1.0), scaled(-1.0)
    one.identity, other.identity = "1", "-1"
    fit(cloud, dataclasses.replace(QUICK, reward=one), state=state)
    with pytest.raises(OutputError, match="other data or settings"):
        fit(cloud, dataclasses.replace(QUICK, reward=other), state=state)


def test_settings_and_parts_of_the_wrong_form_are_refused(cloud):
    with pytest.raises(UsageError, match="did you mean 'unbalanced'"):
        dataclasses.replace(QUICK, balance="unblanced")
    for change in ({"held_share": 0.0}, {"held_share": float("nan")}, {"candidates": 0}):
        with pytest.raises(UsageError, match="held_share is"):
            dataclasses.replace(QUICK, **change)
    with pytest.raises(UsageError, match="lr nan"):
        Schedule(lr=float("nan"))
    for width in (0, -3, cloud.features.shape[1], 100):
        with pytest.raises(UsageError, match=f"to width {width}: give a width from 1 to 11"):
            fit(cloud, dataclasses.replace(QUICK, proxy=Projection(width)))
    for reward, said in ((lambda z, y, t, s: z, r"shape \(\d+, 3\)"), (lambda z, y, t, s: 1.0, "float")):
        with pytest.raises(ShapeError, match=f"the reward gives {said}.*one number a row"):
            fit(cloud, dataclasses.replace(QUICK, reward=reward))


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_fractions_that_leave_no_choice_are_refused(cloud, fraction):
    with pytest.raises(SubsetError, match="above 0 and below 1"):
        fit(cloud, fraction=fraction)


def test_bad_inputs_are_refused(cloud):
    z, h, y = cloud.logits, cloud.features, cloud.labels
    with pytest.raises(ShapeError, match="one row a"):
        QUICK.fit(z[:-1], h, y, 0.2)
    with pytest.raises(ShapeError, match="float32"):
        QUICK.fit(z, h.double(), y, 0.2)
    with pytest.raises(ShapeError, match="labels are int32"):
        QUICK.fit(z, h, y.astype(np.int32), 0.2)
    broken = h.clone()
    broken[5, 2] = torch.inf
    with pytest.raises(DataError, match="features of 1 samples are not finite"):
        QUICK.fit(z, broken, y, 0.2)
    for scores, said in (
        (np.full(len(y), np.nan), "scores are not finite"),
        (np.ones(len(y)), "ranks say nothing"),
        (np.ones(3), "one number a sample"),
    ):
        with pytest.raises(DataError, match=said):
            fit(cloud, scores=scores)
    empty = np.where(y == 1, 0, y)
    with pytest.raises(DataError, match="class 1 has 0"):
        QUICK.fit(z, h, empty, 0.2)
    for part in ("score", "proxy", "reward", "estimator"):
        with pytest.raises(UsageError, match="known:"):
            fit(cloud, dataclasses.replace(QUICK, **{part: "nosuch"}), scores=None)


def test_parts_can_be_replaced(cloud):
    used = set()

    def score(signals):
        used.add("score")
        return signals.features[:, 0].double().numpy()

    def reward(logits, labels, teacher, temperature):
        used.add("reward")
        return -logits.square().mean(1)

    def estimator(phi, evaluate):
        used.add("estimator")
        return Estimate(np.array([1.0, -1.0]), 0.0, 0.0, 0)

    learner = dataclasses.replace(QUICK, score=score, reward=reward, estimator=estimator, proxy=Bottleneck(3))
    found = fit(cloud, learner, scores=None)
    assert used == {"score", "reward", "estimator"}
    assert found.learned[0] > 1 > found.learned[1]


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("reward", REWARDS)
def test_every_proxy_and_reward_searches(cloud, proxy, reward):
    found = fit(cloud, dataclasses.replace(QUICK, proxy=proxy, reward=reward, schedule=Schedule(steps=2)))
    assert len(found.ids) == 240
    assert np.isfinite(found.rewards).all()


def test_the_score_estimator_searches(noisy_top):
    learner = IFBeta(
        proxy=Projection(8),
        budget=Budget(steps=60, weight_decay=0.01),
        estimator=ScoreFunction(32),
        schedule=Schedule(20),
    )
    assert mass_above(*fit(noisy_top, learner).learned, 0.8) < 0.15


@pytest.mark.parametrize("balance", ["balanced", "equal", "unbalanced"])
def test_balance(cloud, balance):
    found = fit(cloud, dataclasses.replace(QUICK, balance=balance, schedule=Schedule(1)), fraction=0.1)
    counts = np.bincount(cloud.labels[found.ids])
    assert counts.sum() == 120
    assert (counts.tolist() == [40, 40, 40]) == (balance != "unbalanced")


def test_best_of_several_draws(cloud):
    one, best = fit(cloud), fit(cloud, dataclasses.replace(QUICK, candidates=6))
    assert (one.chosen_of, best.chosen_of) == (1, 6)
    assert len(best.ids) == len(one.ids)


def test_adam_climbs_and_comes_to_rest():
    schedule = Schedule(steps=200, lr=0.1)
    state = SearchState.begin(schedule)
    top = np.log([3.0, 0.5])
    while not ended(state, schedule):
        ascend(state, schedule, lambda phi, step: Estimate(top - phi, -float(((top - phi) ** 2).sum()), 0.0, 4))
    assert result_of(state, schedule) == pytest.approx((3.0, 0.5), rel=0.05)
    assert state.step < 200
    assert state.trials == 4 * state.step


def test_parameters_stay_in_their_bounds():
    schedule = Schedule(steps=100, lr=1.0)
    state = SearchState.begin(schedule)
    while not ended(state, schedule):
        ascend(state, schedule, lambda phi, step: Estimate(np.array([1.0, -1.0]), 0.0, 0.0, 0))
    assert state.path[-1] == pytest.approx([50, 0.05])


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0}, {"average": 0}, {"start": (0.01, 1.0)}])
def test_schedules_that_go_nowhere_are_refused(change):
    with pytest.raises(UsageError):
        Schedule(**change)


@pytest.mark.parametrize("name", SAMPLE_SCORES)
def test_scores_find_strangers_hard(cloud, name):
    logits, held = cloud.logits.clone(), np.arange(0, 1200, 10)
    wrong = np.arange(5, 1200, 60)
    logits[wrong] = 0
    logits[wrong, (cloud.labels[wrong] + 1) % 3] = 8
    labels = cloud.labels.copy()
    features = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).float() + 0.1 * cloud.features[:, :3]
    if name == "crossfit":
        labels[wrong] = (labels[wrong] + 1) % 3
    values = SAMPLE_SCORES[name](Signals(logits, features, torch.from_numpy(labels), held))
    assert values.shape == (1200,)
    assert values.dtype == np.float64
    if name != "removal":
        assert np.median(values[wrong]) > np.quantile(values, 0.9)


def test_mean_logits_are_those_of_the_mean_probability(cloud):
    views = [cloud.logits, cloud.logits.flip(0), 3 * cloud.logits]
    expected = torch.stack([v.softmax(1) for v in views]).mean(0)
    torch.testing.assert_close(mean_logits(views).softmax(1), expected)
    with pytest.raises(DataError, match="no view"):
        mean_logits([])
