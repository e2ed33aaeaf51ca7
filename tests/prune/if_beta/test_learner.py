"""The search: results on planted data, reproducibility, resuming, and rejection of bad input."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from kdfast.data.holdout import hold_out
from kdfast.errors import DataError, DivergedError, OutputError, ShapeError, SubsetError, UsageError
from kdfast.pruning.if_beta import IFBeta
from kdfast.pruning.if_beta.estimators import Estimate, ScoreFunction, Trial
from kdfast.pruning.if_beta.evaluator import PolicyEvaluator
from kdfast.pruning.if_beta.policy import StratifiedSampler
from kdfast.pruning.if_beta.proxy import PROXIES, Bottleneck, Projection, ProxyData, ProxyTrainingConfig
from kdfast.pruning.if_beta.reward import REWARDS
from kdfast.pruning.if_beta.scores import SAMPLE_SCORES, HeadInputs, mean_logits
from kdfast.pruning.if_beta.search import Schedule
from kdfast.pruning.if_beta.selector.costs import distillation_seconds

QUICK = IFBeta(proxy=Projection(4), budget=ProxyTrainingConfig(steps=30, batch_size=32), schedule=Schedule(steps=6))


def fit(cloud, learner=QUICK, fraction=0.2, seed=0, **more):
    return learner.fit(cloud.logits, cloud.features, cloud.labels, fraction, seed, **{"scores": cloud.scores, **more})


def mass_above(a, b, u):
    from scipy.stats import beta

    return float(beta(a, b).sf(u))


def test_avoids_noise_in_the_top_ranks(noisy_top):
    found = fit(noisy_top, IFBeta(proxy=Projection(8), budget=ProxyTrainingConfig(steps=60, weight_decay=0.01)))
    assert mass_above(*found.learned, 0.8) < 0.05
    assert (found.u[found.ids] > 0.8).mean() < 0.05
    assert found.gain.difference > found.gain.half_width > 0
    assert (found.a, found.b) == found.learned


def test_finds_the_uniform_policy_where_it_is_best(two_halves):
    learner = IFBeta(proxy=Projection(2), budget=ProxyTrainingConfig(steps=60), schedule=Schedule(start=(2.5, 0.6)))
    found = fit(two_halves, learner)
    assert found.learned == pytest.approx((1, 1), abs=0.3)


def test_keeps_the_uniform_policy_where_none_is_better(two_halves):
    found = fit(two_halves, dataclasses.replace(QUICK, schedule=Schedule(steps=1, start=(8.0, 0.3))))
    assert (found.a, found.b) == (1.0, 1.0)
    assert found.learned != (1.0, 1.0)


@pytest.mark.slow
def test_search_reaches_the_best_of_a_grid(noisy_top):
    learner = IFBeta(proxy=Projection(8), budget=ProxyTrainingConfig(steps=60, weight_decay=0.01))
    found = fit(noisy_top, learner)
    pool, held_out = hold_out(noisy_top.labels, 3)
    strata = noisy_top.labels[pool]
    sampler = StratifiedSampler.from_ranks(found.u[pool], pool, strata, round(0.2 * len(pool)))
    x = learner.proxy.transform(noisy_top.features, 0)
    data = ProxyData(x, torch.from_numpy(noisy_top.labels), noisy_top.logits)
    evaluator = PolicyEvaluator(learner.proxy, REWARDS["kd"], learner.budget, data, held_out, 0)
    axis, repeats = np.geomspace(0.2, 12, 15), 8

    def rewards(policies, step, draws):
        trials = [Trial(a, b, k) for a, b in policies for k in range(draws)]
        outcomes = evaluator.evaluate(trials, sampler=sampler, step=step)
        return np.array([o.reward for o in outcomes]).reshape(len(policies), draws)

    policies = [(a, b) for a in axis for b in axis]
    best = policies[np.concatenate([rewards([p], 999, repeats) for p in policies]).mean(1).argmax()]
    # On fresh draws: the best policy of the grid was selected partly by its draws.
    mine, other = rewards([found.learned, best], 1234, 64)
    difference = mine - other
    assert found.trials <= 0.25 * len(policies) * repeats
    assert difference.mean() > -2 * difference.std(ddof=1) / len(difference) ** 0.5


def test_same_seed_gives_identical_results(cloud):
    one, two, other = fit(cloud), fit(cloud), fit(cloud, seed=1)
    assert one.rewards == two.rewards
    assert one.path == two.path
    np.testing.assert_array_equal(one.ids, two.ids)
    assert one.rewards != other.rewards


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resumes_after_an_interruption(cloud, tmp_path, stop):
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


def test_rejects_the_checkpoint_of_another_search(cloud, tmp_path):
    state = tmp_path / "idx.search.json"
    fit(cloud, state=state)
    for change, said in (
        ({"fraction": 0.3}, "`fraction` was 0.2, is 0.3"),
        ({"seed": 1}, "`seed` was 0, is 1"),
        ({"scores": -cloud.scores}, '`scores` was "[0-9a-f]{12}'),
        ({"learner": IFBeta(schedule=Schedule(3))}, "`schedule` .steps. was 6, is 3"),
    ):
        with pytest.raises(OutputError, match=f"of another search.*{said}"):
            fit(cloud, state=state, **change)
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "identity": "older", "settings": None}))
    with pytest.raises(OutputError, match="computed the scores removal and absolute with the teacher's own head"):
        fit(cloud, state=state)
    state.write_text(json.dumps({**content, "identity": "newer"}))
    with pytest.raises(OutputError, match="another version of kdfast, whose scores differ"):
        fit(cloud, state=state)
    state.write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="is not the checkpoint of a search"):
        fit(cloud, state=state)
    state.write_text("not json")
    with pytest.raises(OutputError, match="not valid JSON"):
        fit(cloud, state=state)


def test_checkpoint_survives_a_reward_that_is_not_finite(cloud, tmp_path):
    calls, state = [], tmp_path / "idx.search.json"

    def breaks(logits, labels, teacher, temperature):
        calls.append(1)
        return torch.full((len(labels),), torch.nan) if len(calls) > 20 else torch.zeros(len(labels)) + logits.mean()

    breaks.identity = "breaks"
    with pytest.raises(DivergedError, match=r"step 2 at a = .* not finite"):
        fit(cloud, dataclasses.replace(QUICK, reward=breaks), state=state)
    assert json.loads(state.read_text())["state"]["step"] == 2


@pytest.mark.parametrize("candidates", [1, 3])
def test_rejects_final_rewards_that_are_not_finite(cloud, candidates):
    calls = []
    learner = dataclasses.replace(QUICK, schedule=Schedule(steps=1), candidates=candidates)
    fit(cloud, dataclasses.replace(learner, reward=lambda z, y, t, temperature: calls.append(1) or z.sum(1)))
    # The comparison evaluates 32 proxies; the candidates come last.
    fine = len(calls) - (candidates if candidates > 1 else 32)
    calls.clear()

    def breaks(logits, labels, teacher, temperature):
        calls.append(1)
        return logits.sum(1) * (torch.nan if len(calls) > fine else 1.0)

    with pytest.raises(DivergedError, match="final draws is not finite"):
        fit(cloud, dataclasses.replace(learner, reward=breaks))


def test_a_part_without_identity_cannot_use_a_checkpoint(cloud, tmp_path):
    def scaled(scale):
        def reward(logits, labels, teacher, temperature):
            return scale * REWARDS["kd"](logits, labels, teacher, temperature)

        return reward

    state = tmp_path / "s.json"
    for part in (scaled(1.0), lambda z, y, t, temperature: z.sum(1)):
        with pytest.raises(UsageError, match=r"the reward .* has no identity"):
            fit(cloud, dataclasses.replace(QUICK, reward=part), state=state)
        assert not state.exists()
    one, other = scaled(1.0), scaled(-1.0)
    one.identity, other.identity = "1", "-1"
    fit(cloud, dataclasses.replace(QUICK, reward=one), state=state)
    with pytest.raises(OutputError, match=r"`reward` was .*reward:1\", is .*reward:-1\"\): resume"):
        fit(cloud, dataclasses.replace(QUICK, reward=other), state=state)


def test_rejects_bad_settings_and_parts(cloud):
    with pytest.raises(UsageError, match="did you mean 'unbalanced'"):
        dataclasses.replace(QUICK, balance="unblanced")
    for change in ({"held_share": 0.0}, {"held_share": float("nan")}, {"candidates": 0}):
        with pytest.raises(UsageError, match="`held_share` is"):
            dataclasses.replace(QUICK, **change)
    with pytest.raises(UsageError, match="lr nan"):
        Schedule(lr=float("nan"))
    for width in (0, -3, cloud.features.shape[1], 100):
        with pytest.raises(UsageError, match=f"`width` is {width} .*: pass a width from 1 to 11"):
            fit(cloud, dataclasses.replace(QUICK, proxy=Projection(width)))
    for reward, said in ((lambda z, y, t, s: z, r"shape \(\d+, 3\)"), (lambda z, y, t, s: 1.0, "float")):
        with pytest.raises(ShapeError, match=f"the reward returned {said}.*one number per row"):
            fit(cloud, dataclasses.replace(QUICK, reward=reward))


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_rejects_fractions_that_leave_no_choice(cloud, fraction):
    with pytest.raises(SubsetError, match="above 0 and below 1"):
        fit(cloud, fraction=fraction)


def test_rejects_bad_inputs(cloud):
    z, h, y = cloud.logits, cloud.features, cloud.labels
    with pytest.raises(ShapeError, match="one row per"):
        QUICK.fit(z[:-1], h, y, 0.2)
    with pytest.raises(ShapeError, match=r"features.* are torch.int64 .*pass floats"):
        QUICK.fit(z, h.long(), y, 0.2)
    with pytest.raises(DataError, match="features of 1200 samples are not finite"):
        QUICK.fit(z, h.double() * 1e300, y, 0.2)
    with pytest.raises(DataError, match="`labels` are float32"):
        QUICK.fit(z, h, y.astype(np.float32), 0.2)
    broken = h.clone()
    broken[5, 2] = torch.inf
    with pytest.raises(DataError, match="features of 1 samples are not finite"):
        QUICK.fit(z, broken, y, 0.2)
    for scores, said in (
        (np.full(len(y), np.nan), "scores are not finite"),
        (np.ones(len(y)), "ranks need different scores"),
        (np.ones(3), "one per sample"),
    ):
        with pytest.raises(DataError, match=said):
            fit(cloud, scores=scores)
    for part in ("score", "proxy", "reward", "estimator"):
        with pytest.raises(UsageError, match="known:"):
            fit(cloud, dataclasses.replace(QUICK, **{part: "nosuch"}), scores=None)


def test_parts_can_be_replaced(cloud):
    used = set()

    def score(inputs):
        used.add("score")
        return inputs.features[:, 0].double().numpy()

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
def test_search_works_with_every_proxy_and_reward(cloud, proxy, reward):
    found = fit(cloud, dataclasses.replace(QUICK, proxy=proxy, reward=reward, schedule=Schedule(steps=2)))
    assert len(found.ids) == 240
    assert np.isfinite(found.rewards).all()


def test_search_works_with_the_score_function_estimator(noisy_top):
    learner = IFBeta(
        proxy=Projection(8),
        budget=ProxyTrainingConfig(steps=60, weight_decay=0.01),
        estimator=ScoreFunction(32),
        schedule=Schedule(20),
    )
    assert mass_above(*fit(noisy_top, learner).learned, 0.8) < 0.15


@pytest.mark.parametrize("balance", ["balanced", "equal", "unbalanced"])
def test_balance_determines_class_counts(cloud, balance):
    found = fit(cloud, dataclasses.replace(QUICK, balance=balance, schedule=Schedule(1)), fraction=0.1)
    counts = np.bincount(cloud.labels[found.ids])
    assert counts.sum() == 120
    assert (counts.tolist() == [40, 40, 40]) == (balance != "unbalanced")


def test_selects_among_several_draws(cloud):
    one, best = fit(cloud), fit(cloud, dataclasses.replace(QUICK, candidates=6))
    assert (one.candidates, best.candidates) == (1, 6)
    assert len(best.ids) == len(one.ids)


def test_adam_reaches_the_optimum_and_stops():
    schedule = Schedule(steps=200, lr=0.1)
    state = schedule.initial()
    top = np.log([3.0, 0.5])
    while not schedule.is_finished(state):
        schedule.take_step(state, lambda phi, _: Estimate(top - phi, -float(((top - phi) ** 2).sum()), 0.0, 4), None)
    assert schedule.learned(state) == pytest.approx((3.0, 0.5), rel=0.05)
    assert state.step < 200
    assert state.trials == 4 * state.step


def test_parameters_stay_within_their_bounds():
    schedule = Schedule(steps=100, lr=1.0)
    state = schedule.initial()
    while not schedule.is_finished(state):
        schedule.take_step(state, lambda phi, _: Estimate(np.array([1.0, -1.0]), 0.0, 0.0, 0), None)
    assert state.path[-1] == pytest.approx([50, 0.05])


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0}, {"average": 0}, {"start": (0.01, 1.0)}])
def test_rejects_bad_schedules(change):
    with pytest.raises(UsageError):
        Schedule(**change)


@pytest.mark.parametrize("name", SAMPLE_SCORES)
def test_scores_rank_mislabeled_samples_as_hard(cloud, name):
    logits, held_out = cloud.logits.clone(), np.arange(0, 1200, 10)
    wrong = np.arange(5, 1200, 60)
    logits[wrong] = 0
    logits[wrong, (cloud.labels[wrong] + 1) % 3] = 8
    labels = cloud.labels.copy()
    features = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).float() + 0.1 * cloud.features[:, :3]
    if name in ("crossfit", "removal", "absolute"):  # these fit a head of their own to the labels
        labels[wrong] = (labels[wrong] + 1) % 3
    values = SAMPLE_SCORES[name](HeadInputs(logits, features, torch.from_numpy(labels), held_out))
    assert values.shape == (1200,)
    assert values.dtype == np.float64
    if name != "removal":
        assert np.median(values[wrong]) > np.quantile(values, 0.9)


def test_mean_logits_give_the_mean_probability(cloud):
    views = [cloud.logits, cloud.logits.flip(0), 3 * cloud.logits]
    expected = torch.stack([v.softmax(1) for v in views]).mean(0)
    torch.testing.assert_close(mean_logits(views).softmax(1), expected)
    with pytest.raises(DataError, match="`views` is empty"):
        mean_logits([])


def test_distillation_seconds_grow_with_the_number_of_samples(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    # Every step lasts one tick: 240 epochs of ceil(100 / 64) = 2 and of 4 steps.
    assert distillation_seconds(100, 3, (32, 32)) == 480
    assert distillation_seconds(256, 3, (32, 32)) == 960


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_width_are_those_converted_to_float32(cloud, dtype):
    z, h = cloud.logits.to(dtype), cloud.features.to(dtype)
    expected = QUICK.fit(z.float(), h.float(), cloud.labels, 0.2, scores=cloud.scores)
    found = QUICK.fit(z, h, cloud.labels, 0.2, scores=cloud.scores)
    assert (found.ids == expected.ids).all()
    assert found.path == expected.path
    if dtype != torch.bfloat16:
        arrays = QUICK.fit(z.numpy(), h.numpy(), cloud.labels, 0.2, scores=cloud.scores)
        assert (arrays.ids == expected.ids).all()
