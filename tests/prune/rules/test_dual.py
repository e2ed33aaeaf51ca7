import numpy as np
import pytest

from kdfast.errors import DataError
from kdfast.prune.rules.dual import beta_parameters
from kdfast.prune.rules.registry import choose

N = 4000
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [3000, 700, 300])).astype(np.int64)


def made(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mean_p = rng.random(N)
    return mean_p * (1 - mean_p) * rng.random(N), mean_p


def run(fraction: float, **changes) -> np.ndarray:
    score, mean_p = made()
    arguments = {"rule": "dual", "extras": {"mean_p": mean_p}, **changes}
    return choose(arguments.pop("scores", score), arguments.pop("labels", LABELS), fraction, **arguments)


def test_parameters_of_the_density() -> None:
    # b = 15 (1 - .4) (1 - .9^5.5), a = 16 - b
    a, b = beta_parameters(0.4, 0.1, 5.5)
    assert b == pytest.approx(15 * 0.6 * (1 - 0.9**5.5))
    assert a + b == pytest.approx(16)


def test_the_draw_against_a_plain_one() -> None:
    """Gumbel keys of the plainly written weights, in the order of the same noise."""
    from scipy.stats import beta as density

    from kdfast.prune.rules.base import uniform

    score, mean_p = made()
    mu = mean_p[np.argsort(-score)[:10]].mean()
    for fidelity, exponent in (("paper", 5.5), ("code", 7.5)):
        kept = run(0.1, balance="unbalanced", seed=4, options={"fidelity": fidelity})
        b = 15 * (1 - mu) * (1 - 0.9**exponent)
        p = np.clip(mean_p, 2**-12, 1 - 2**-12)
        weights = density.pdf(p, 16 - b, b) * score
        keys = weights / -np.log(uniform(4, np.arange(N)))  # exponential races: the same order as Gumbel keys
        assert set(kept.tolist()) == set(np.argsort(-keys)[: len(kept)].tolist())


def test_more_pruning_keeps_easier_samples() -> None:
    _, mean_p = made()
    means = [mean_p[run(f, balance="unbalanced")].mean() for f in (0.05, 0.2, 0.6)]
    assert means[0] > means[1] > means[2]


def test_every_class_is_drawn_with_the_density_of_all_samples() -> None:
    """The anchors are those of the whole set, also when each class has its own budget."""
    score, mean_p = made()
    mu = float(mean_p[np.argsort(-score)[:10]].mean())
    assert (run(0.1) == run(0.1, options={"mu": mu})).all()
    assert (run(0.1) != run(0.1, options={"mu": 0.9})).any()


def test_the_constant_c_goes_by_the_number_of_classes() -> None:
    for classes, c in ((10, 5.5), (100, 4.0), (1000, 11.0)):
        labels = np.arange(N) % classes
        assert (run(0.5, labels=labels) == run(0.5, labels=labels, options={"c": c})).all()


def test_samples_with_a_score_of_zero_come_last() -> None:
    score, _ = made()
    zero = np.arange(N) % 4 == 0
    kept = run(0.5, scores=np.where(zero, 0.0, score + 1e-3), balance="unbalanced")
    assert not zero[kept].any()
    assert zero[run(0.9, scores=np.where(zero, 0.0, score + 1e-3), balance="unbalanced")].any()


def test_probabilities_of_zero_and_one_do_not_break_the_draw() -> None:
    mean_p = np.repeat([0.0, 1.0], N // 2)
    assert len(run(0.3, extras={"mean_p": mean_p})) == 1200


def test_scores_and_probabilities_that_are_not_duals() -> None:
    score, mean_p = made()
    with pytest.raises(DataError, match="negative: score with dual"):
        run(0.1, scores=score - 1)
    with pytest.raises(DataError, match="not within 0 and 1"):
        run(0.1, extras={"mean_p": mean_p * 3})
