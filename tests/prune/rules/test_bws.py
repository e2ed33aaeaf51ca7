"""The best window is that of a plain loop over windows, each with its own ridge regression."""

import numpy as np
import pytest
import torch

from kdfast.data.subset import class_budgets
from kdfast.errors import DataError
from kdfast.pruning.options import complete_options
from kdfast.pruning.rules import bws
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.rules.base import RuleInputs
from kdfast.pruning.rules.registry import RULES


def made(sizes: list[int], seed: int = 0, depth: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, labels and features: class means with noise that grows with the score, the hardest mislabeled."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    scores = rng.random(len(labels))
    centers = rng.normal(size=(len(sizes), depth)) * 2
    shown = np.where(scores > 0.85, (labels + 1) % len(sizes), labels)
    features = centers[shown] + rng.normal(size=(len(labels), depth)) * (0.1 + 2 * scores[:, None])
    return scores, labels, features.astype(np.float32)


def windows_by_hand(scores, labels, fraction: float, budgets, step: float) -> list[np.ndarray]:
    """Return the samples of each window, following the public code: the same start in the ranking of every class."""
    groups = [np.arange(len(labels))] if budgets is None else [np.flatnonzero(labels == c) for c in range(len(budgets))]
    counts = [round(fraction * len(labels))] if budgets is None else budgets
    windows = []
    for start in np.arange(0, 1.0001 - fraction, step).round(12).tolist():
        kept = []
        for members, count in zip(groups, counts, strict=True):
            hardest_first = members[np.argsort(-scores[members])]
            first = min(round(start * len(members)), len(members) - count)
            kept.extend(hardest_first[first : first + count])
        windows.append(np.sort(kept))
    return windows


def correct_by_hand(features, labels, window, ridge: float) -> int:
    """Return how many of all samples the ridge regression on the samples of a window classifies correctly."""
    x = np.concatenate((np.ones((len(labels), 1)), features.astype(np.float64)), axis=1)
    y = np.eye(labels.max() + 1)[labels]
    weights = np.linalg.inv(x[window].T @ x[window] + ridge * np.eye(x.shape[1])) @ x[window].T @ y[window]
    return int(((x @ weights).argmax(1) == labels).sum())


@pytest.mark.parametrize("balance", ["balanced", "equal", "unbalanced"])
@pytest.mark.parametrize("sizes", [[80, 80, 80], [150, 60, 20, 3]], ids=["equal", "long tail"])
@pytest.mark.parametrize(("fraction", "options"), [(0.1, {}), (0.3, {"step": 0.1, "ridge": 30.0}), (0.62, {})])
def test_bws_matches_the_public_code(sizes, balance: str, fraction: float, options: dict) -> None:
    scores, labels, features = made(sizes, seed=round(100 * fraction))
    total = round(fraction * len(labels))
    mode = "equal" if balance == "equal" else "proportional"
    budgets = None if balance == "unbalanced" else class_budgets(labels, total, mode).tolist()
    windows = windows_by_hand(scores, labels, fraction, budgets, options.get("step", 0.05))
    correct = [correct_by_hand(features, labels, window, options.get("ridge", 1.0)) for window in windows]
    assert len(set(correct)) > 1, "the windows must differ for this test to mean anything"
    chosen = select_subset(
        scores, labels, fraction, rule="bws", balance=balance, features=features, options=options
    )  # fmt: skip
    best = int(np.argmax(correct))
    assert chosen.ids.tolist() == windows[best].tolist()
    assert chosen.options["start"] == pytest.approx(best * options.get("step", 0.05))


def test_the_best_window_skips_mislabeled_samples_when_little_is_kept() -> None:
    scores, labels, features = made([200, 200, 200])
    for fraction in (0.05, 0.1):
        start = select_subset(scores, labels, fraction, rule="bws", features=features).options["start"]
        assert start is not None
        assert float(start) >= 0.1


def test_of_equally_good_windows_the_hardest_wins() -> None:
    """Two classes that every window separates: all windows are perfect."""
    labels = np.arange(40) % 2
    features = np.where(labels == 1, 5.0, -5.0)[:, None]
    kept = select_subset(np.arange(40.0), labels, 0.1, rule="bws", features=features)
    assert kept.ids.tolist() == [36, 37, 38, 39]
    assert kept.options["start"] == 0


def test_a_given_start_needs_no_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bws, "best_start", None)
    scores = np.arange(100.0)
    kept = select_subset(
        scores, np.zeros(100, int), 0.2, rule="bws", features=np.ones((100, 1)), options={"start": 0.25}
    )
    assert kept.ids.tolist() == list(range(55, 75)), "the hardest 25 are skipped, the next 20 kept"
    late = select_subset(scores, np.zeros(100, int), 0.2, rule="bws", features=np.ones((100, 1)), options={"start": 1})
    assert late.ids.tolist() == list(range(20)), "a window ends at the easiest sample at the latest"


def test_blocks_do_not_change_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels, features = made([90, 50, 20], seed=3)
    whole = select_subset(scores, labels, 0.2, rule="bws", features=features)
    monkeypatch.setattr(bws, "_BLOCK_BYTES", 1000)
    parts = select_subset(scores, labels, 0.2, rule="bws", features=features)
    assert whole.options == parts.options
    assert (whole.ids == parts.ids).all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_singular_and_badly_scaled_features_give_a_window(scale: float) -> None:
    """Columns that repeat or vanish make the products of the features singular, and no ridge is visible beside 1e24."""
    scores, labels, features = made([60, 60])
    features = np.concatenate((features, features, 0 * features), axis=1) * scale
    assert len(select_subset(scores, labels, 0.2, rule="bws", features=features).ids) == 24


def test_bws_needs_labels() -> None:
    n = 30
    options = complete_options("bws", RULES["bws"].options, {})
    inputs = RuleInputs(np.arange(n), np.zeros(n), 6, 0.2, 0, np.arange(n), np.ones((n, 2)), options=options)
    with pytest.raises(DataError, match="has no labels"):
        RULES["bws"].with_defaults(inputs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_window_on_gpu_equals_that_on_cpu() -> None:
    scores, labels, features = made([900, 500, 20], seed=3)
    here = select_subset(scores, labels, 0.2, rule="bws", features=features)
    assert here.options == select_subset(scores, labels, 0.2, rule="bws", features=features, device="cuda").options
