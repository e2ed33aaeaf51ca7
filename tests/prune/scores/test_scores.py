"""Every score matches plain loops over the recorded values."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from kdfast.data.source import ArraySplit, Source, default_view_spec
from kdfast.data.views import Normalization
from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import DataError, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.pruning.rules.registry import RULES
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import SCORES, compute_score

N, C, D, EPOCHS, RUNS = 60, 3, 4, 12, 5
LABELS = np.random.default_rng(5).permutation(np.arange(N) % C).astype(np.int64)


@pytest.fixture(scope="module")
def dynamics(tmp_path_factory):
    """Five runs of 12 epochs. Each run leaves out 12 samples, and each sample is left out once."""
    path = tmp_path_factory.mktemp("dynamics") / "dyn"
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 1, (N, 1))
    for run in range(RUNS):
        mask = np.arange(N) % RUNS != run
        with DynamicsRecorder(path, N, LABELS, epochs=EPOCHS, run=run, runs=RUNS, mask=mask, top_k=2,
                              feature_epochs=(3, 7, 11)) as recorder:  # fmt: skip
            for epoch in range(EPOCHS):
                logits = rng.normal(0, 1, (N, C)) + np.eye(C)[LABELS] * (easy + 0.1 * epoch)
                recorder.update(np.arange(N), torch.from_numpy(logits), torch.from_numpy(rng.normal(0, 2, (N, D))))
                recorder.end_epoch()
    return Dynamics.open(path)


@pytest.fixture(scope="module")
def teacher():
    """Return logits and features of a teacher, float32."""
    rng = np.random.default_rng(1)
    features = rng.normal(0, 1, (N, D)).astype(np.float32)
    weights = rng.normal(0, 1, (C, D + 1)).astype(np.float32)
    return features @ weights[:, :D].T + weights[:, D], features


@pytest.fixture(scope="module")
def images():
    """Return random images of the labels as a source, and a flattened network for them."""
    pixels = np.random.default_rng(3).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
    split = ArraySplit(pixels, LABELS, "images")
    source = Source("memory", "npz", ("a", "b", "c"), split, split, default_view_spec(split.shape, flip=False))
    torch.manual_seed(0)
    statistics = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    settings = {"sharpness": "none", "teacher": "0" * 64, "data": source.fingerprint, "held": 0.1, "seed": 0}
    metadata = {"flattened": settings}
    return source, Model(build_net("resnet8", C).eval(), "resnet8", C, source.classes, statistics, metadata)


@pytest.fixture
def inputs(dynamics, teacher, images):
    def make(**changes):
        base = {"labels": LABELS, "seed": 0, "logits": teacher[0], "features": teacher[1], "dynamics": dynamics}
        return ScoreInputs(**{**base, "source": images[0], "network": images[1], **changes})

    return make


def trained_on(run):
    return [i for i in range(N) if i % RUNS != run]


def averaged(of_run):
    """Return for each sample i the mean of of_run(run, i) over the runs that trained on it."""
    return [np.mean([of_run(run, i) for run in range(RUNS) if i % RUNS != run]) for i in range(N)]


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z))
    return e / e.sum()


def error_norm(z, y):
    p = softmax(z)
    return float(np.sqrt(sum((p[k] - (k == y)) ** 2 for k in range(C))))


def test_forgetting(inputs, dynamics):
    for setting, never in (("max", EPOCHS), ("zero", 0)):

        def events(run, i, never=never):
            correct = [bool(dynamics.correct(run)[t, i]) for t in range(EPOCHS)]
            if not any(correct):
                return never
            return sum(correct[t - 1] and not correct[t] for t in range(1, EPOCHS))

        found = compute_score("forgetting", inputs(options={"never_learned": setting})).values
        np.testing.assert_allclose(found, averaged(events))


@pytest.mark.parametrize("method", ["aum", "ccs"])
def test_aum(inputs, dynamics, method):
    expected = averaged(lambda run, i: -np.mean([float(dynamics.margin(run)[t, i]) for t in range(EPOCHS)]))
    np.testing.assert_allclose(compute_score(method, inputs()).values, expected)


def test_el2n_from_dynamics(inputs, dynamics):
    for asked, epoch in ((None, EPOCHS), (4, 4)):
        found = compute_score("el2n", inputs(options={} if asked is None else {"epoch": asked}))
        np.testing.assert_allclose(found.values, averaged(lambda run, i, e=epoch: float(dynamics.el2n(run)[e - 1, i])))
        assert (found.used["use"], found.used["epoch"]) == ("dynamics", epoch)


def test_el2n_from_the_teacher(inputs, teacher):
    expected = [error_norm(z, y) for z, y in zip(teacher[0], LABELS, strict=True)]
    for given in ({"dynamics": None}, {"options": {"use": "cache"}}):
        np.testing.assert_allclose(compute_score("el2n", inputs(**given)).values, expected, rtol=1e-6)


def test_grand_matches_autograd(inputs, teacher):
    logits, features = (torch.from_numpy(a).double() for a in teacher)
    expected = []
    for z, h, y in zip(logits, features, LABELS, strict=True):
        weight = torch.zeros(C, D, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(C, dtype=torch.float64, requires_grad=True)
        loss = torch.nn.functional.cross_entropy((z + weight @ h + bias)[None], torch.tensor([int(y)]))
        gradients = torch.autograd.grad(loss, [weight, bias])
        expected.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    np.testing.assert_allclose(compute_score("grand", inputs(dynamics=None)).values, expected, rtol=1e-5)


def test_grand_from_dynamics(inputs, dynamics):
    for asked, epoch in ((None, 12), (4, 4)):

        def norm(run, i, epoch=epoch):
            h = dynamics.features(run, epoch - 1)[i].astype(np.float64)
            return float(dynamics.el2n(run)[epoch - 1, i]) * np.sqrt(1 + sum(x * x for x in h))

        found = compute_score("grand", inputs(options={} if asked is None else {"epoch": asked}))
        np.testing.assert_allclose(found.values, averaged(norm))
        assert found.used["epoch"] == epoch


def test_grand_of_the_full_network(inputs, images):
    source, model = images
    net, statistics = model.net, model.normalization
    found = compute_score("grand", inputs(options={"network": "full"})).values
    expected = []
    for image, y in zip(source.train.images, LABELS, strict=True):
        x = (torch.from_numpy(image).float() / 255 - torch.tensor(statistics.mean)) / torch.tensor(statistics.std)
        loss = torch.nn.functional.cross_entropy(net(x.permute(2, 0, 1)[None]), torch.tensor([int(y)]))
        gradients = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])
        expected.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(UsageError, match="kdfast teacher train"):
        compute_score("grand", inputs(options={"network": "full"}, network=None))


def test_memorization(inputs, dynamics):
    for measure in ("correct", "p_y"):
        for asked, epoch in ((None, EPOCHS), (5, 5)):
            options = {"measure": measure} | ({} if asked is None else {"epoch": asked})
            found = compute_score("memorization", inputs(options=options))
            of_run = dynamics.correct if measure == "correct" else dynamics.p_y
            for i in range(N):
                inside = [float(of_run(run)[epoch - 1, i]) for run in range(RUNS) if i in trained_on(run)]
                outside = [float(of_run(run)[epoch - 1, i]) for run in range(RUNS) if i not in trained_on(run)]
                assert found.values[i] == pytest.approx(np.mean(inside) - np.mean(outside))
                assert found.extras["inside"][i] == pytest.approx(np.mean(inside))
                assert found.extras["outside"][i] == pytest.approx(np.mean(outside))


def test_memorization_standard_error(inputs, dynamics):
    found = compute_score("memorization", inputs()).extras["stderr"]
    soft = compute_score("memorization", inputs(options={"measure": "p_y"})).extras["stderr"]
    for i in range(N):
        total = 0.0
        for side in (True, False):
            hits = [bool(dynamics.correct(run)[-1, i]) for run in range(RUNS) if (i % RUNS != run) == side]
            share = (sum(hits) + 1) / (len(hits) + 2)
            total += share * (1 - share) / len(hits)
        assert found[i] == pytest.approx(np.sqrt(total))
        inside = [float(dynamics.p_y(run)[-1, i]) for run in trained_runs(i)]
        assert soft[i] == pytest.approx(np.sqrt(np.var(inside, ddof=1) / len(inside) + 0.25), rel=1e-6)
    assert found.min() > 0


def trained_runs(i):
    return [run for run in range(RUNS) if i % RUNS != run]


def test_moderate(inputs, teacher, dynamics):
    for fidelity, center in (("paper", np.mean), ("code", np.median)):
        found = compute_score("moderate", inputs(options={"fidelity": fidelity})).values
        for i, y in enumerate(LABELS):
            middle = center(np.array([h for h, other in zip(teacher[1], LABELS, strict=True) if other == y]), axis=0)
            assert found[i] == pytest.approx(np.sqrt(((teacher[1][i] - middle) ** 2).sum()), rel=1e-5)
    recorded = compute_score("moderate", inputs(logits=None, features=None)).values

    def distance(run, i):
        rows = dynamics.features(run, 11).astype(np.float64)
        return np.linalg.norm(rows[i] - rows[LABELS[i] == LABELS].mean(axis=0))

    np.testing.assert_allclose(recorded, averaged(distance), rtol=1e-6)


def test_dual(inputs, dynamics):
    for options, window, first in (({}, 10, 12), ({"window": 4, "first": 7}, 4, 7)):

        def uncertainty(run, i, window=window, first=first):
            p = [float(dynamics.p_y(run)[t, i]) for t in range(first)]
            parts = [p[s : s + window] for s in range(first - window + 1)]
            return np.mean([np.std(part) * (1 - np.mean(part)) for part in parts])

        def mean_p(run, i, first=first):
            return np.mean([float(dynamics.p_y(run)[t, i]) for t in range(first)])

        found = compute_score("dual", inputs(options=options))
        np.testing.assert_allclose(found.values, averaged(uncertainty))
        np.testing.assert_allclose(found.extras["mean_p"], averaged(mean_p))


@pytest.mark.parametrize("name", ["el2n", "aum", "forgetting"])
def test_d2_returns_the_score_to_start_from(inputs, name):
    found = compute_score("d2", inputs(options={"score": name})).values
    assert np.array_equal(found, compute_score(name, inputs()).values)


def test_random_depends_only_on_seed_and_index(inputs):
    first = compute_score("random", inputs()).values
    assert np.array_equal(first, compute_score("random", inputs()).values)
    assert not np.array_equal(first, compute_score("random", inputs(seed=1)).values)
    part = ScoreInputs(labels=LABELS[:10], seed=0)
    assert np.array_equal(first[:10], compute_score("random", part).values)


def newton_head(features, labels, l2):
    """Return inputs with bias, the optimal softmax head by plain Newton steps, and its Hessian."""
    x = np.hstack([features.astype(np.float64), np.ones((len(features), 1))])
    n, d = x.shape
    w = np.zeros((C, d))
    for _ in range(50):
        p = np.array([softmax(w @ row) for row in x])
        gradient = (p - np.eye(C)[labels]).T @ x / n + l2 * w
        hessian = l2 * np.eye(C * d)
        for row, q in zip(x, p, strict=True):
            hessian += np.kron(np.diag(q) - np.outer(q, q), np.outer(row, row)) / n
        w -= np.linalg.solve(hessian, gradient.ravel()).reshape(C, d)
    return x, w, hessian


def sample_gradient(w, row, y):
    return np.outer(softmax(w @ row) - np.eye(C)[y], row).ravel()


def test_self_influence(inputs, teacher):
    x, w, hessian = newton_head(teacher[1], LABELS, 0.05)
    expected = []
    for row, y in zip(x, LABELS, strict=True):
        g = sample_gradient(w, row, y)
        expected.append(g @ np.linalg.solve(hessian, g) / N)
    found = compute_score("influence", inputs(options={"kind": "self", "l2": 0.05})).values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def removal_effect(teacher, halves, l2):
    x = np.hstack([teacher[1].astype(np.float64), np.ones((N, 1))])
    effects = [[] for _ in range(N)]
    for half in halves:
        trained = [i for i in range(N) if i not in half]
        _, w, hessian = newton_head(teacher[1][trained], LABELS[trained], l2)
        held = np.mean([sample_gradient(w, x[i], LABELS[i]) for i in half], axis=0)
        direction = np.linalg.solve(hessian, held)
        for i in trained:
            effects[i].append(direction @ sample_gradient(w, x[i], LABELS[i]) / len(trained))
    return np.array([np.mean(e) for e in effects])


def test_removal_and_absolute_influence(inputs, teacher):
    from kdfast.pruning.scores.influence import draw_holdout

    options = {"l2": 0.05, "holdout": 0.2}
    halves = draw_holdout(LABELS, 0.2, 0)
    assert [np.bincount(LABELS[half]).tolist() for half in halves] == [[2, 2, 2], [2, 2, 2]]
    assert not set(halves[0]) & set(halves[1])
    expected = removal_effect(teacher, halves, 0.05)
    found = compute_score("influence", inputs(options=options)).values
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-8)
    size = compute_score("influence", inputs(options={**options, "kind": "absolute"})).values
    np.testing.assert_allclose(size, np.abs(expected), rtol=1e-3, atol=1e-8)


def test_self_influence_of_the_teachers_own_head(inputs, teacher):
    l2 = 0.05
    x = np.hstack([teacher[1].astype(np.float64), np.ones((N, 1))])
    hessian = l2 * np.eye(C * (D + 1))
    probabilities = [softmax(z) for z in teacher[0]]
    for row, q in zip(x, probabilities, strict=True):
        hessian += np.kron(np.diag(q) - np.outer(q, q), np.outer(row, row)) / N
    expected = []
    for row, q, y in zip(x, probabilities, LABELS, strict=True):
        g = np.outer(q - np.eye(C)[y], row).ravel()
        expected.append(g @ np.linalg.solve(hessian, g) / N)
    found = compute_score("influence", inputs(options={"kind": "self", "l2": l2, "polish": "no"})).values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", SCORES)
def test_score_is_finite_and_repeatable(inputs, method):
    first, second = (compute_score(method, inputs()) for _ in range(2))
    assert first.values.dtype == np.float64
    assert first.values.shape == (N,)
    assert np.isfinite(first.values).all()
    assert np.array_equal(first.values, second.values)
    assert len(np.unique(first.values)) > N / 10
    assert set(SCORES[method].options) <= first.used.keys()
    assert SCORES[method].rule in RULES
    assert SCORES[method].summary
    assert inspect.getdoc(SCORES[method].compute)


@pytest.mark.parametrize("method", [name for name, entry in SCORES.items() if entry.needs])
def test_error_about_a_missing_input_names_its_command(method):
    with pytest.raises(UsageError) as caught:
        compute_score(method, ScoreInputs(LABELS, 0))
    for need in SCORES[method].needs:
        command = {"teacher": "teacher flatten"}.get(need, need)
        assert f"kdfast {command} and pass `{need}`" in str(caught.value)


def test_error_about_a_typo_suggests_the_nearest_name(inputs):
    with pytest.raises(UsageError, match="'forgeting': did you mean 'forgetting'"):
        compute_score("forgeting", inputs())
    with pytest.raises(UsageError, match="'nevr_learned': did you mean 'never_learned'"):
        compute_score("forgetting", inputs(options={"nevr_learned": "max"}))
    with pytest.raises(UsageError, match="must be one of max, zero"):
        compute_score("forgetting", inputs(options={"never_learned": "least"}))


BAD = {
    "labels of other data": ("aum", {"labels": (LABELS + 1) % C}, "other labels"),
    "another length": ("aum", {"labels": LABELS[:-1], "logits": None, "features": None}, "this data has 59"),
    "logits of another length": (
        "el2n",
        {"logits": np.zeros((N - 1, C), np.float32)},
        r"shape \(59, 3\) for 60",
    ),
    "NaN logits": ("el2n", {"logits": np.full((N, C), np.nan, np.float32)}, "logits of 60 .*not finite"),
    "NaN features": (
        "moderate",
        {"features": np.full((N, D), np.nan, np.float32)},
        "features of 60 .*not finite",
    ),
    "too few classes": ("el2n", {"logits": np.zeros((N, C - 1), np.float32)}, "labels up to 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_rejects_inputs_that_do_not_fit(inputs, case):
    method, changes, message = BAD[case]
    with pytest.raises(DataError, match=message):
        compute_score(method, inputs(**changes))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("el2n", {"epoch": 13}, "after epochs 1 to 12, not 13"),
        ("grand", {"epoch": 5}, r"after epochs \[4, 8, 12\], not 5"),
        ("memorization", {"epoch": 13}, "has 12 epochs, not 13"),
        ("dual", {"window": 20}, "20 epochs for a window, but there are 12"),
        ("influence", {"holdout": 0.5, "kind": "absolute", "l2": -1}, "l2=-1"),
    ],
)
def test_rejects_options_that_the_inputs_cannot_meet(inputs, method, options, message):
    with pytest.raises(UsageError, match=message):
        compute_score(method, inputs(options=options))


def test_rejects_dynamics_with_too_few_epochs_or_runs(tmp_path):
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=1, mask=np.arange(N) > 0) as recorder:
        recorder.update(np.arange(N), torch.zeros(N, C))
        recorder.end_epoch()
    inputs = ScoreInputs(LABELS, 0, dynamics=Dynamics.open(tmp_path / "dyn"))
    with pytest.raises(UsageError, match="forgetting compares epochs"):
        compute_score("forgetting", inputs)
    with pytest.raises(DataError, match=r"trained on 1 of 60 samples \(for example 0\)"):
        compute_score("aum", inputs)
    with pytest.raises(DataError, match="never inside"):
        compute_score("memorization", inputs)


@pytest.mark.parametrize("method", [name for name, entry in SCORES.items() if "cache" in entry.needs])
def test_accepts_float64_logits_and_features(inputs, teacher, method):
    wide = {"logits": teacher[0].astype(np.float64), "features": torch.from_numpy(teacher[1]).double()}
    found, expected = (compute_score(method, inputs(dynamics=None, **given)).values for given in (wide, {}))
    assert np.array_equal(found, expected)


def test_inputs_are_not_modified(inputs):
    given = inputs()
    before = {f.name: np.array(getattr(given, f.name)) for f in dataclasses.fields(given) if f.name != "dynamics"}
    for method in SCORES:
        compute_score(method, given)
    for name in ("labels", "logits", "features"):
        assert np.array_equal(before[name], getattr(given, name))
