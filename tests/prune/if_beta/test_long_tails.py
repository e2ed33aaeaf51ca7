"""IF-Beta keeps at least one sample of each class wherever the total allows it, as the rules do."""

import numpy as np
import pytest

from kdfast.data.subset import class_budgets
from kdfast.errors import SubsetError
from kdfast.pruning.if_beta import IFBeta
from kdfast.pruning.if_beta.proxy import ProxyTrainingConfig
from kdfast.pruning.if_beta.search import Schedule

CASES = {
    "one of ten of each class": (np.full(10, 10), 0.1),
    "classes of two samples": (np.full(10, 2), 0.5),
    "a class of one sample": (np.array([60, 15, 4, 1]), 0.5),
    "1 : 100": (np.array([int(200 * 100 ** (-c / 19)) for c in range(20)]), 0.1),
}


def fit(sizes: np.ndarray, fraction: float, balance: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    logits, features = rng.normal(size=(len(labels), len(sizes))), rng.normal(size=(len(labels), 8))
    budget, schedule = ProxyTrainingConfig(steps=2), Schedule(steps=1)
    learner = IFBeta(budget=budget, schedule=schedule, score="residual", balance=balance)
    found = learner.fit(logits.astype(np.float32), features.astype(np.float32), labels, fraction)
    return np.bincount(labels[found.ids], minlength=len(sizes)), labels


@pytest.mark.parametrize("name", CASES)
def test_budgets_of_classes_are_those_of_the_rules(name: str) -> None:
    sizes, fraction = CASES[name]
    for balance, mode in (("balanced", "proportional"), ("equal", "equal")):
        kept, labels = fit(sizes, fraction, balance)
        assert kept.min() >= 1
        assert kept.tolist() == class_budgets(labels, round(fraction * len(labels)), mode).tolist()


def test_fewer_samples_than_classes_are_refused() -> None:
    with pytest.raises(SubsetError, match=r"keeping 6 of 20 samples leaves 4 of 10 classes empty: keep at least 10"):
        fit(np.full(10, 2), 0.3, "balanced")
