"""Scores from dynamics match what the public codes compute from the same predictions, as plain loops."""

import math

import numpy as np
import pytest

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import UsageError
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score

N, C, EPOCHS, RUNS = 40, 4, 14, 2
LABELS = np.arange(N) % C
HALF = 2e-3  # relative error of float16 recordings


def record(path, logits, labels, feature_epochs=()):
    """Record dynamics from logits (runs, E, N, C); features are the logits."""
    runs, epochs, n, _ = logits.shape
    for run in range(runs):
        settings = {"epochs": epochs, "run": run, "runs": runs, "feature_epochs": feature_epochs}
        with DynamicsRecorder(path, n, labels, **settings) as recorder:
            for rows in logits[run]:
                recorder.update(np.arange(n), rows, rows)
                recorder.end_epoch()
    return Dynamics.open(path)


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(0)
    learned = np.linspace(0, 3, EPOCHS)[:, None, None] * np.eye(C)[LABELS]
    easy = rng.normal(0, 1, (N, 1))
    return (rng.normal(0, 1.2, (RUNS, EPOCHS, N, C)) + learned + easy * np.eye(C)[LABELS]).astype(np.float32)


@pytest.fixture(scope="module")
def dynamics(tmp_path_factory, logits):
    return record(tmp_path_factory.mktemp("dynamics") / "dyn", logits, LABELS, (0, 1, 2, 5))


def probabilities(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def score(method, dynamics, labels=LABELS, **options):
    return compute_score(method, ScoreInputs(labels, 0, dynamics=dynamics, options=options))


def mean_over_runs(of_run):
    return [np.mean([of_run(run, i) for run in range(RUNS)]) for i in range(N)]


def sample_deviation(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def test_dyn_unc_is_the_mean_deviation_of_all_windows(dynamics, logits):
    p = probabilities(logits)
    for window in (2, 5, 10, EPOCHS):

        def uncertainty(run, i, window=window):
            of_label = [p[run, t, i, LABELS[i]] for t in range(EPOCHS)]
            return np.mean([sample_deviation(of_label[s : s + window]) for s in range(EPOCHS - window + 1)])

        found = score("dyn-unc", dynamics, window=window).values
        np.testing.assert_allclose(found, mean_over_runs(uncertainty), rtol=HALF, atol=1e-4)


def test_dyn_unc_follows_the_public_code_of_dataset_pruning(dynamics, logits):
    """A buffer of the last J epochs; its deviation times 10 counts once it is full, but not after the last epoch."""
    p = probabilities(logits)

    def uncertainty(run, i):
        buffer, history = [0.0] * 10, []
        for t in range(EPOCHS):
            buffer = [*buffer[1:], p[run, t, i, LABELS[i]]]
            if 9 <= t < EPOCHS - 1:
                history.append(10 * sample_deviation(buffer))
        return np.mean(history)

    found = score("dyn-unc", dynamics, fidelity="code").values
    np.testing.assert_allclose(10 * found, mean_over_runs(uncertainty), rtol=HALF, atol=1e-3)
    assert not np.allclose(found, score("dyn-unc", dynamics).values, rtol=HALF)


def test_dyn_unc_of_three_samples(tmp_path):
    """The label's probability is .5, .5, .5 or .2, .4, .6 or .9, .1, .9; in windows of two: |difference| / sqrt(2)."""
    p = np.array([[0.5, 0.2, 0.9], [0.5, 0.4, 0.1], [0.5, 0.6, 0.9]])
    logits = np.log(np.stack([p, 1 - p], axis=-1))[None]
    found = score("dyn-unc", record(tmp_path / "dyn", logits, np.zeros(3, int)), np.zeros(3, int), window=2).values
    np.testing.assert_allclose(found, [0, 0.2 / math.sqrt(2), 0.8 / math.sqrt(2)], atol=1e-3)


def test_dyn_unc_needs_a_window_of_epochs(dynamics):
    with pytest.raises(UsageError, match="dyn-unc needs 15 epochs for a window, but there are 14"):
        score("dyn-unc", dynamics, window=15)
    with pytest.raises(UsageError, match="needs 14 epochs for a window, but there are 13"):
        score("dyn-unc", dynamics, window=14, fidelity="code")


def test_el2n_of_epochs_1_to_10_follows_the_codes_of_ccs_and_d2(dynamics, logits):
    """They add up the error norms of the epochs before the eleventh."""
    p = probabilities(logits)

    def accumulated(run, i):
        total = 0.0
        for epoch in range(EPOCHS):
            if epoch == 10:
                break
            total += math.sqrt(sum((p[run, epoch, i, c] - (c == LABELS[i])) ** 2 for c in range(C)))
        return total

    found = score("el2n", dynamics, epochs="1..10")
    np.testing.assert_allclose(found.values, mean_over_runs(accumulated), rtol=HALF)
    assert (found.used["epochs"], found.used["epoch"]) == ("1..10", None)


def test_el2n_of_one_epoch_is_that_of_the_range_with_this_epoch(dynamics):
    one, span = score("el2n", dynamics, epoch=7), score("el2n", dynamics, epochs="7..7")
    assert np.array_equal(one.values, span.values)
    assert (one.used["epoch"], one.used["epochs"]) == (7, None)


def test_grand_sums_over_epochs_that_have_features(dynamics, logits):
    p = probabilities(logits)

    def accumulated(run, i):
        total = 0.0
        for epoch in (1, 2):
            error = math.sqrt(sum((p[run, epoch, i, c] - (c == LABELS[i])) ** 2 for c in range(C)))
            total += error * math.sqrt(1 + sum(float(h) ** 2 for h in logits[run, epoch, i]))
        return total

    np.testing.assert_allclose(score("grand", dynamics, epochs="2..3").values, mean_over_runs(accumulated), rtol=HALF)
    with pytest.raises(UsageError, match=r"after epochs \[1, 2, 3, 6\], not 1..5"):
        score("grand", dynamics, epochs="1..5")


def test_epochs_excludes_epoch_and_needs_dynamics(dynamics):
    with pytest.raises(UsageError, match=r"epoch=3 and epochs=1\.\.2 exclude each other"):
        score("el2n", dynamics, epoch=3, epochs="1..2")
    with pytest.raises(UsageError, match=r"after epochs 1 to 14, not 5\.\.15"):
        score("el2n", dynamics, epochs="5..15")
    teacher = ScoreInputs(LABELS, 0, logits=np.zeros((N, C), np.float32), options={"epochs": "1..2"})
    with pytest.raises(UsageError, match="el2n of a teacher has no epochs"):
        compute_score("el2n", teacher)


@pytest.mark.parametrize("method", ["aum", "ccs"])
def test_probability_margins_follow_the_codes_of_ccs_and_d2(dynamics, logits, method):
    """They accumulate p(label) - max p(other) over the epochs and prune the lowest first."""
    p = probabilities(logits)

    def accumulated(run, i):
        total = 0.0
        for epoch in range(EPOCHS):
            others = [p[run, epoch, i, c] for c in range(C) if c != LABELS[i]]
            total += p[run, epoch, i, LABELS[i]] - max(others)
        return total

    found = score(method, dynamics, margin="probability").values
    np.testing.assert_allclose(-EPOCHS * found, mean_over_runs(accumulated), rtol=HALF, atol=EPOCHS * 1e-3)


def test_margins_of_logits_and_of_probabilities_rank_differently(tmp_path):
    """Two epochs: logit margins 1, 1 or 6, -3 have the means 1 < 1.5; their probability margins .46, .46 and .995,
    -.905 have the means .46 > .045."""
    logits = np.array([[[1, 0], [6, 0]], [[1, 0], [0, 3]]], np.float32)[None]
    dynamics, labels = record(tmp_path / "dyn", logits, np.zeros(2, int)), np.zeros(2, int)
    np.testing.assert_allclose(score("aum", dynamics, labels).values, [-1, -1.5])
    found = score("aum", dynamics, labels, margin="probability").values
    np.testing.assert_allclose(found, [-0.4621, -0.0450], atol=1e-3)


# Correctness of three samples in two runs of four epochs: one forgotten once or twice, one never learned in the second
# run, one never forgotten.
CORRECT = np.array(
    [
        [[1, 1, 0], [0, 0, 1], [1, 1, 1], [1, 0, 1]],
        [[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]],
    ],
    bool,
)


@pytest.fixture(scope="module")
def three_samples(tmp_path_factory):
    logits = np.where(CORRECT[..., None], [2.0, 0.0], [0.0, 2.0]).astype(np.float32)
    return record(tmp_path_factory.mktemp("three") / "dyn", logits, np.zeros(3, int))


def test_forgetting_of_never_learned_samples_follows_the_code_of_toneva(three_samples):
    """A run in which a sample is never correct adds as many events as it has epochs."""
    found = score("forgetting", three_samples, np.zeros(3, int)).values
    np.testing.assert_allclose(found, [(1 + 2) / 2, (2 + 4) / 2, 0])


def test_forgetting_of_never_learned_samples_follows_the_codes_of_ccs_d2_and_dual(three_samples):
    found = score("forgetting", three_samples, np.zeros(3, int), never_learned="zero").values
    np.testing.assert_allclose(found, [(1 + 2) / 2, (2 + 0) / 2, 0])


def test_forgetting_of_never_learned_samples_follows_the_code_of_data_diet(three_samples):
    """The mean over runs with infinity for a run in which a sample is never correct; here the score is the number of
    epochs, which no other sample reaches."""
    found = score("forgetting", three_samples, np.zeros(3, int), never_learned="infinite").values
    np.testing.assert_allclose(found, [(1 + 2) / 2, 4, 0])


def test_forgetting_in_training_batches_follows_the_code_of_toneva(tmp_path):
    """Events are counted from one training batch with the sample to the next, never learned included."""
    labels = np.zeros(3, int)
    in_batches, after_epochs = CORRECT
    with DynamicsRecorder(tmp_path / "dyn", 3, labels, epochs=4, record="batch") as recorder:
        for epoch in range(4):
            for ids in ([2, 0], [1]):
                recorder.update_batch(ids, np.where(in_batches[epoch][ids][:, None], [2.0, 0.0], [0.0, 2.0]))
            recorder.update([0, 1, 2], np.where(after_epochs[epoch][:, None], [2.0, 0.0], [0.0, 2.0]))
            recorder.end_epoch()
    dynamics = Dynamics.open(tmp_path / "dyn")
    np.testing.assert_allclose(score("forgetting", dynamics, labels, when="batch").values, [1, 2, 0])
    np.testing.assert_allclose(score("forgetting", dynamics, labels).values, [2, 4, 0])


def test_forgetting_in_training_batches_needs_them(three_samples):
    with pytest.raises(UsageError, match="record again with kdfast dynamics"):
        score("forgetting", three_samples, np.zeros(3, int), when="batch")
