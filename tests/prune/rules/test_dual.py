import numpy as np
import pytest

from kdfast.errors import DataError
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.rules.dual import beta_parameters

N = 4000
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [3000, 700, 300])).astype(np.int64)


def made(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mean_p = rng.random(N)
    return mean_p * (1 - mean_p) * rng.random(N), mean_p


def run(fraction: float, **changes) -> np.ndarray:
    score, mean_p = made()
    arguments = {"rule": "dual", "extras": {"mean_p": mean_p}, **changes}
    return select_subset(arguments.pop("scores", score), arguments.pop("labels", LABELS), fraction, **arguments).ids


def test_beta_parameters() -> None:
    # b = 15 (1 - .4) (1 - .9^5.5), a = 16 - b
    a, b = beta_parameters(0.4, 0.1, 5.5)
    assert b == pytest.approx(15 * 0.6 * (1 - 0.9**5.5))
    assert a + b == pytest.approx(16)


def test_dual_matches_the_public_code() -> None:
    """The draw matches exponential races on the public code's weights with the same noise."""
    from scipy.stats import beta as density

    from kdfast.pruning.rules.draw import rule_uniform

    score, mean_p = made()
    mu = mean_p[np.argsort(-score)[:10]].mean()
    kept = run(0.1, balance="unbalanced", seed=4)
    b = 15 * (1 - mu) * (1 - 0.9**5.5)
    p = np.clip(mean_p, 2**-12, 1 - 2**-12)
    weights = density.pdf(p, 16 - b, b) * score
    keys = weights / -np.log(rule_uniform(4, np.arange(N)))  # the same order as Gumbel keys
    assert set(kept.tolist()) == set(np.argsort(-keys)[: len(kept)].tolist())


def test_more_pruning_keeps_easier_samples() -> None:
    _, mean_p = made()
    means = [mean_p[run(f, balance="unbalanced")].mean() for f in (0.05, 0.2, 0.6)]
    assert means[0] > means[1] > means[2]


def test_classes_share_the_density_of_all_samples() -> None:
    """Anchors come from all samples, even with class budgets."""
    score, mean_p = made()
    mu = float(mean_p[np.argsort(-score)[:10]].mean())
    assert (run(0.1) == run(0.1, options={"mu": mu})).all()
    assert (run(0.1) != run(0.1, options={"mu": 0.9})).any()


def test_default_c_depends_on_the_number_of_classes() -> None:
    for classes, c in ((10, 5.5), (100, 4.0), (1000, 11.0)):
        labels = np.arange(N) % classes
        assert (run(0.5, labels=labels) == run(0.5, labels=labels, options={"c": c})).all()


def test_samples_with_score_zero_come_last() -> None:
    score, _ = made()
    zero = np.arange(N) % 4 == 0
    kept = run(0.5, scores=np.where(zero, 0.0, score + 1e-3), balance="unbalanced")
    assert not zero[kept].any()
    assert zero[run(0.9, scores=np.where(zero, 0.0, score + 1e-3), balance="unbalanced")].any()


def test_accepts_probabilities_of_zero_and_one() -> None:
    mean_p = np.repeat([0.0, 1.0], N // 2)
    assert len(run(0.3, extras={"mean_p": mean_p})) == 1200


def test_rejects_scores_and_probabilities_that_are_not_duals() -> None:
    score, mean_p = made()
    with pytest.raises(DataError, match="negative: score with dual"):
        run(0.1, scores=score - 1)
    with pytest.raises(DataError, match="not within 0 and 1"):
        run(0.1, extras={"mean_p": mean_p * 3})
