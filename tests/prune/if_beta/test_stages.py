"""The published search: its policy, both of its stages, its proxies, and what it finds on planted data."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import beta

from kdfast.errors import DataError, DivergedError, OutputError, UsageError
from kdfast.files import without_seal
from kdfast.pruning.if_beta import IFBeta
from kdfast.pruning.if_beta.estimators import Estimate, Outcome, ScoreFunction
from kdfast.pruning.if_beta.policy import StratifiedSampler, average_ranks
from kdfast.pruning.if_beta.proxy import Linear, Projection, ProxyData, ProxyTrainingConfig, train_proxies
from kdfast.pruning.if_beta.selector.presets import OPTIONS, build_learner
from kdfast.pruning.if_beta.stages import MAX_TAU, MIN_TAU, TwoStages, beta_parameters, mode_and_sharpness

VALUES = np.array([0.3, -1.0, 2.0, 0.1, 0.9, -0.4])
DEFAULTS = {name: option.default for name, option in OPTIONS["paper"].items()}
PAPER = build_learner(DEFAULTS | {"preset": "paper", "repeats": 4, "draws": 8}, "balanced")
QUICK = dataclasses.replace(PAPER, schedule=TwoStages(mu_step=0.25, repeats=2, steps=3), estimator=ScoreFunction(4))


def fit(cloud, learner=QUICK, fraction=0.2, seed=0, **more):
    return learner.fit(cloud.logits, cloud.features, cloud.labels, fraction, seed, **{"scores": cloud.scores, **more})


def outcomes_of(reward):
    """Return a function that gives a trial the reward of its (a, b)."""
    return lambda trials, step: [Outcome(reward(t.a, t.b), 0.5, lambda: np.zeros(2)) for t in trials]


# The policy.


@pytest.mark.parametrize(("mu", "tau"), [(0.0, 3.0), (0.25, 8.0), (1.0, 0.5)])
def test_the_density_over_ranks_mirrors_the_papers_over_percentiles(mu, tau):
    s = np.linspace(0.01, 0.99, 50)  # small = hard
    expected = beta(tau * mu + 1, tau * (1 - mu) + 1).pdf(s)
    np.testing.assert_allclose(beta(*beta_parameters(mu, tau)).pdf(1 - s), expected, rtol=1e-9)


def test_mode_0_keeps_hard_samples_and_mode_1_easy_ones():
    u = average_ranks(np.arange(100.0), np.zeros(100, np.int64))
    sampler = StratifiedSampler.from_ranks(u, np.arange(100), np.zeros(100, np.int64), 10)
    hard, easy = (u[sampler.draw(*beta_parameters(mu, 30.0), sampler.gumbel(0, 0, 0))].mean() for mu in (0.0, 1.0))
    assert hard > 0.85
    assert easy < 0.15


@pytest.mark.parametrize(("mu", "tau"), [(0.0, 0.01), (0.3, 4.0), (1.0, 49.0)])
def test_mode_and_sharpness_are_read_back(mu, tau):
    assert mode_and_sharpness(*beta_parameters(mu, tau)) == pytest.approx((mu, tau))


# The first stage.


def test_every_mode_is_tried_once_with_the_same_noise():
    search, seen = TwoStages(mu_step=0.25, tau=2.0, repeats=3), []

    def evaluate(trials, step):
        seen.append((step, [(t.a, t.b, t.draw) for t in trials]))
        return outcomes_of(lambda a, b: -abs(mode_and_sharpness(a, b)[0] - 0.7))(trials, step)

    state = search.initial()
    for _ in range(5):
        search.take_step(state, None, evaluate)
    modes = [0, 0.25, 0.5, 0.75, 1]
    assert seen == [(0, [(*map(pytest.approx, beta_parameters(mu, 2.0)), k) for k in range(3)]) for mu in modes]
    assert state.path == [pytest.approx(beta_parameters(mu, 2.0)) for mu in [*modes, 0.75]]
    assert (state.step, state.trials, state.phi) == (5, 15, [0.75, math.log(2)])


@pytest.mark.parametrize(("given", "points"), [(0.1, 11), (0.05, 21), (0.3, 4), (1, 2)])
def test_grid_reaches_both_ends(given, points):
    grid = TwoStages(mu_step=given).grid
    assert (len(grid), grid[0], grid[-1]) == (points, 0, 1)


# The second stage.


def expected_reward(sampler, a, b):
    weights, total = np.exp(sampler.log_weights(a, b)), 0.0
    for first, second in itertools.permutations(range(6), 2):
        p = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        total += p * reward_of([first, second])
    return total


def reward_of(drawn):
    return float(VALUES[drawn].sum() + 0.5 * VALUES[drawn].prod())


@pytest.mark.parametrize("mu", [0.4, 0.75])
def test_reinforce_matches_the_exact_gradient_in_the_logarithm_of_tau(mu):
    strata = np.zeros(6, np.int64)
    sampler = StratifiedSampler.from_ranks(average_ranks(np.arange(6.0), strata), np.arange(6), strata, 2)
    search, tau, step = TwoStages(mu_step=0.5, tau=3.0), 3.0, 1e-5
    ends = [expected_reward(sampler, *beta_parameters(mu, tau * math.exp(s))) for s in (step, -step)]
    exact = (ends[0] - ends[1]) / (2 * step)

    def gradient(seed):
        def evaluate(trials, _):
            outcomes = []
            for t in trials:
                drawn = sampler.draw(t.a, t.b, sampler.gumbel(seed, 0, t.draw))
                slope = sampler.log_probability_gradient(drawn, t.a, t.b)
                outcomes.append(Outcome(reward_of(drawn), 0.5, lambda slope=slope: slope))
            return outcomes

        state = search.initial()
        state.step, state.phi, state.path = len(search.grid), [mu, math.log(tau)], [list(beta_parameters(mu, tau))]
        search.take_step(state, ScoreFunction(40, natural=False), evaluate)
        return state.first[1] / (1 - 0.9)  # Adam's first mean holds a tenth of the first gradient

    found = np.array([gradient(seed) for seed in range(100)])
    error = found.std(ddof=1) / 10
    assert abs(found.mean() - exact) < 4 * error + 1e-3
    assert error < 0.1 < abs(exact)


def test_step_sizes_fall_from_a_tenth_to_a_hundredth_along_a_cosine():
    search = TwoStages(mu_step=1, tau=1.0)
    state = search.initial()
    while not search.is_finished(state):
        search.take_step(state, lambda phi, _: Estimate(np.ones(2), 0.0, 0.5, 0), outcomes_of(lambda a, b: 0.0))
    # The step of Adam is the step size while the gradient is constant; here it grows with tau.
    steps = np.diff(np.log([mode_and_sharpness(*point)[1] for point in state.path[2:]]))
    assert len(steps) == 20
    expected = 0.01 + 0.09 * (1 + np.cos(np.pi * np.arange(20) / 19)) / 2
    assert steps[0] == pytest.approx(0.1)
    np.testing.assert_allclose(steps, expected, rtol=0.6)
    assert (np.diff(steps) < 0).all()


def test_the_mode_stays_and_tau_keeps_within_its_bounds():
    for direction, bound in ((1.0, MAX_TAU), (-1.0, MIN_TAU)):
        search = TwoStages(mu_step=0.5, tau=2.0, lr=3.0, final_lr=3.0)
        state = search.initial()
        while not search.is_finished(state):
            search.take_step(
                state,
                lambda phi, _, d=direction: Estimate(d * np.ones(2), 0.0, 0.5, 0),
                outcomes_of(lambda a, b: -abs(a - b)),
            )
        assert mode_and_sharpness(*search.learned(state)) == pytest.approx((0.5, bound))


def test_a_reward_that_is_not_finite_leaves_the_state():
    search = TwoStages(mu_step=0.5)
    state = search.initial()
    with pytest.raises(DivergedError, match=r"step 0 at a = 7, b = 1: the reward nan"):
        search.take_step(state, None, outcomes_of(lambda a, b: math.nan))
    assert state == search.initial()


@pytest.mark.parametrize(
    "change",
    [{"mu_step": 0}, {"mu_step": 1.5}, {"tau": 0}, {"tau": 50}, {"lr": 0.01, "final_lr": 0.1}, {"steps": 0},
     {"repeats": 0}, {"tau": math.nan}],
)  # fmt: skip
def test_rejects_bad_settings(change):
    with pytest.raises(UsageError, match="TwoStages has"):
        TwoStages(**change)


# The proxies.


def test_a_proxy_of_one_pass_sees_every_sample_of_its_subset_once(cloud):
    seen = []

    class Watched(Linear):
        def forward(self, parameters, x):
            seen.append(x.detach().clone())
            return super().forward(parameters, x)

    data = ProxyData(Linear().transform(cloud.features, 0), torch.from_numpy(cloud.labels), cloud.logits)
    draws = np.stack([np.arange(0, 300), np.arange(500, 800)])
    train_proxies(Watched(), data, draws, ProxyTrainingConfig(steps=None, batch_size=128), 0, 0)
    assert [x.shape[1] for x in seen] == [128, 128, 44]
    for k, rows in enumerate(draws):
        found = torch.cat([x[k] for x in seen])
        torch.testing.assert_close(found.sort(0).values, data.x[torch.from_numpy(rows)].sort(0).values)


def test_one_pass_is_adam_at_a_constant_rate_on_the_distillation_loss(cloud):
    rows = np.arange(0, 90)
    data = ProxyData(Linear().transform(cloud.features, 0), torch.from_numpy(cloud.labels), cloud.logits)
    budget = ProxyTrainingConfig(steps=None, batch_size=90, lr=1e-3, weight_decay=0.0, alpha=0.5, temperature=4.0)
    (found,) = train_proxies(Linear(), data, rows[None], budget, 0, 0)
    x, y, z = (
        part[:90].double() if part.is_floating_point() else part[:90]
        for part in (data.x, data.labels, data.teacher_logits)
    )
    weights = torch.zeros(x.shape[1], 3, dtype=torch.float64, requires_grad=True)
    student = x @ weights
    teacher = (z / 4).softmax(1)
    kl = 16 * (teacher * (teacher.log() - (student / 4).log_softmax(1))).sum(1).mean()
    (0.5 * torch.nn.functional.cross_entropy(student, y) + 0.5 * kl).backward()
    # The first step of Adam is the sign of the gradient, times the rate.
    torch.testing.assert_close(found[0].double(), -1e-3 * weights.grad.sign(), rtol=1e-3, atol=1e-7)


# The search.


def test_avoids_noise_in_the_hardest_fifth(noisy_fifth):
    found = fit(noisy_fifth, PAPER)
    assert beta(*found.learned).sf(0.8) < 0.05
    assert (found.u[found.ids] > 0.8).mean() < 0.05
    assert found.gain.difference > found.gain.half_width > 0
    assert len(found.ids) == 2000


def test_stays_close_to_uniform_where_both_halves_are_needed(two_modes):
    """a and b are at least 1: uniform only as tau goes to 0, so it is the reward that must equal that of uniform."""
    found = fit(two_modes, PAPER)
    a, b = found.learned
    assert a / (a + b) == pytest.approx(0.5, abs=0.06)
    assert (found.a, found.b) == found.learned
    low = (found.u[found.ids] < 0.5).mean()
    assert low == pytest.approx(0.5, abs=0.05)
    assert found.gain.difference > -2 * found.gain.half_width


@pytest.mark.slow
def test_reaches_the_best_of_a_grid_with_a_quarter_of_its_runs(noisy_fifth):
    from kdfast.data.holdout import hold_out
    from kdfast.pruning.if_beta.estimators import Trial
    from kdfast.pruning.if_beta.evaluator import PolicyEvaluator
    from kdfast.pruning.if_beta.reward import REWARDS

    found = fit(noisy_fifth, build_learner(DEFAULTS | {"preset": "paper"}, "balanced"))
    pool, held_out = hold_out(noisy_fifth.labels, 5)
    sampler = StratifiedSampler.from_ranks(found.u[pool], pool, noisy_fifth.labels[pool], round(0.2 * len(pool)))
    x = Linear().transform(noisy_fifth.features, 0)
    data = ProxyData(x, torch.from_numpy(noisy_fifth.labels), noisy_fifth.logits)
    evaluator = PolicyEvaluator(Linear(), REWARDS["ce"], PAPER.budget, data, held_out, 0)

    def rewards(policies, step, draws):
        trials = [Trial(a, b, k) for a, b in policies for k in range(draws)]
        outcomes = evaluator.evaluate(trials, sampler=sampler, step=step)
        return np.array([o.reward for o in outcomes]).reshape(len(policies), draws)

    repeats = 8
    policies = [beta_parameters(mu, tau) for mu in np.linspace(0, 1, 11) for tau in np.geomspace(0.5, 40, 19)]
    best = policies[np.concatenate([rewards([p], 999, repeats) for p in policies]).mean(1).argmax()]
    # Fresh draws: the grid's best is selected by its draws.
    mine, other, uniform = rewards([found.learned, best, (1.0, 1.0)], 1234, 64).mean(1)
    assert found.trials <= 0.25 * len(policies) * repeats
    assert mine - uniform > 0.85 * (other - uniform) > 0


@pytest.mark.parametrize("stop", [2, 5, 6, 8])
def test_resumes_in_both_stages(cloud, tmp_path, stop):
    state, whole = tmp_path / "idx.search.json", fit(cloud)

    def interrupt(done, total, note):
        assert total == 8
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(cloud, state=state, progress=interrupt)
    assert json.loads(state.read_text())["state"]["step"] == stop
    found = fit(cloud, state=state)
    assert (found.path, found.rewards, found.trials) == (whole.path, whole.rewards, whole.trials)
    np.testing.assert_array_equal(found.ids, whole.ids)


def test_refuses_the_checkpoint_of_another_preset_or_of_other_settings(cloud, tmp_path):
    state = tmp_path / "idx.search.json"
    fit(cloud, state=state)
    quick = dataclasses.replace(QUICK, schedule=dataclasses.replace(QUICK.schedule, tau=2.0))
    with pytest.raises(OutputError, match=r"`schedule` \(tau\) was 6.0, is 2.0"):
        fit(cloud, quick, state=state)
    with pytest.raises(OutputError, match=r"of another search.*`proxy` was"):
        fit(cloud, IFBeta(proxy=Projection(4)), state=state)


def test_refuses_a_damaged_checkpoint(cloud, tmp_path):
    state = tmp_path / "idx.search.json"
    fit(cloud, state=state)
    content = without_seal(json.loads(state.read_text()))
    content["state"]["phi"][0] = 9.5  # no mode
    state.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"idx\.search\.json: its phi .* contradict each other: delete it"):
        fit(cloud, state=state)


def test_any_score_ranks_in_both_presets(cloud):
    for learner in (QUICK, IFBeta(proxy=Projection(4), budget=ProxyTrainingConfig(steps=5))):
        named = fit(cloud, dataclasses.replace(learner, score="a score of another file"))
        assert len(named.ids) == 240
