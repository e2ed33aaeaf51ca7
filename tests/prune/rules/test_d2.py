"""D2 matches dense brute force: neighbors, graph, messages and greedy selection."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.errors import UsageError
from kdfast.pruning.options import complete_options
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.rules.base import RuleInputs
from kdfast.pruning.rules.d2 import default_cut, pass_messages
from kdfast.pruning.rules.d2_graph import nearest_neighbors, undirected_graph
from kdfast.pruning.rules.d2_greedy import select_greedily
from kdfast.pruning.rules.registry import RULES

RNG = np.random.default_rng(0)


def dense_distances(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x[:, None].astype(np.float64) - x[None].astype(np.float64)).sum(-1))


def neighbors_by_hand(x: np.ndarray, k: int) -> np.ndarray:
    distances = dense_distances(x)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(("n", "depth", "k"), [(300, 8, 5), (2000, 4, 3), (40, 3, 10), (5, 2, 9), (2, 2, 1)])
def test_neighbors_match_brute_force(n: int, depth: int, k: int) -> None:
    x = RNG.normal(size=(n, depth)).astype(np.float32) * 3 + 40
    found, distances = nearest_neighbors(x, k, block_bytes=4 * n * 37)
    k = min(k, n - 1)
    expected = neighbors_by_hand(x - x.mean(0, dtype=np.float64).astype(np.float32), k)
    assert (found == expected).all()
    np.testing.assert_allclose(distances, np.take_along_axis(dense_distances(x), expected, 1), rtol=1e-5)


def test_neighbors_of_duplicates_and_of_far_clusters_are_exact() -> None:
    """Thirty copies of each point, in clusters far from the origin, are hidden by rounding in the fast product."""
    centers = RNG.normal(size=(40, 16)) * 1000
    x = (np.repeat(centers, 30, axis=0) + RNG.normal(size=(1200, 16)) * 1e-3).astype(np.float32)
    x[::3] = x[0]
    centered = x - x.mean(0, dtype=np.float64).astype(np.float32)
    found, _ = nearest_neighbors(x, 5)
    assert (found == neighbors_by_hand(centered, 5)).all()


def test_neighbors_do_not_depend_on_the_block_size() -> None:
    x = RNG.normal(size=(500, 6)).astype(np.float32)
    first, second = nearest_neighbors(x, 4, block_bytes=1), nearest_neighbors(x, 4)
    assert (first[0] == second[0]).all()
    assert (first[1] == second[1]).all()


def test_no_dense_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    plain = torch.mm

    def watch(*args, **kwargs):
        nonlocal largest
        result = plain(*args, **kwargs)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, "mm", watch)
    nearest_neighbors(RNG.normal(size=(3000, 4)).astype(np.float32), 5, block_bytes=4 * 3000 * 100)
    assert 0 < largest <= 3000 * 100


def graph_by_hand(x: np.ndarray, k: int) -> np.ndarray:
    """Return the dense adjacency: connected if either is among the other's k nearest."""
    joined = np.zeros((len(x), len(x)), bool)
    for i, others in enumerate(neighbors_by_hand(x, k)):
        joined[i, others] = True
    return joined | joined.T


def test_graph_is_undirected_without_double_edges() -> None:
    x = RNG.normal(size=(200, 5)).astype(np.float32)
    starts, ends, lengths = undirected_graph(*nearest_neighbors(x, 4))
    joined = np.zeros((200, 200), bool)
    for i in range(200):
        mine = ends[starts[i] : starts[i + 1]]
        assert (np.diff(mine) > 0).all()
        joined[i, mine] = True
        np.testing.assert_allclose(lengths[starts[i] : starts[i + 1]], dense_distances(x)[i, mine], rtol=1e-6)
    assert (joined == graph_by_hand(x, 4)).all()


def d2_by_hand(scores, x, ties, count, *, k=5, gamma=1.0, gamma_r=0.1, cut=0.0, power=1) -> set[int]:
    """Select with dense matrices and one scan per kept sample."""
    order = np.lexsort((ties, -scores))
    left = order[min(round(cut * len(scores)), len(scores) - count) :]
    s, x, ties = scores[left] - min(0, scores[left].min()), x[left], ties[left]
    d = dense_distances(x) ** power
    joined = graph_by_hand(x, min(k, len(x) - 1))
    u = s + np.where(joined, np.exp(-gamma * d), 0) @ s
    reverse = np.where(joined, np.exp(-gamma_r * d), 0)
    alive, kept = np.ones(len(u), bool), []
    for _ in range(count):
        best = max(np.flatnonzero(alive), key=lambda i: (u[i], -ties[i]))
        alive[best] = False
        kept.append(int(left[best]))
        u = u - reverse[best] * u[best]
    return set(kept)


@pytest.mark.parametrize("labels", [np.arange(240) % 4, np.repeat(np.arange(3), [200, 20, 20])], ids=["equal", "1:10"])
@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize(("fraction", "shift"), [(0.1, 0.0), (0.5, 0.0), (0.3, -5.0), (0.95, 0.0)])
def test_d2_matches_brute_force(labels, fidelity: str, fraction: float, shift: float) -> None:
    labels = labels.astype(np.int64)
    scores, x = RNG.random(240) + shift, RNG.normal(size=(240, 3)).astype(np.float32)
    options = {"fidelity": fidelity, "k": 4, "gamma": 0.7, "gamma_r": 0.2}
    plain = {
        "k": 4,
        "gamma": 0.7,
        "gamma_r": 0.2,
        "cut": default_cut(fraction),
        "power": 2 if fidelity == "paper" else 1,
    }
    kept = select_subset(scores, labels, fraction, rule="d2", features=x, options=options).ids
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        mine = set(kept[labels[kept] == label].tolist())
        expected = d2_by_hand(scores[members], x[members], np.zeros(len(members)), len(mine), **plain)
        assert mine == {int(members[i]) for i in expected}
    everyone = select_subset(scores, labels, fraction, rule="d2", balance="unbalanced", features=x, options=options).ids
    assert set(everyone.tolist()) == d2_by_hand(scores, x, np.zeros(240), len(everyone), **plain)


def public_pipeline(forgetting, margin, x, labels, count: int, cut: float, k: int, gamma: float) -> set[int]:
    """Select with dense matrices as the public code does (coreset mode class, uniform budgets, graph mode sum)."""
    left = np.argsort(margin, kind="stable")[int(cut * len(margin)) :]
    sizes = np.bincount(labels[left])
    budgets, rest = np.zeros(len(sizes), int), count
    for done, label in enumerate(np.argsort(sizes, kind="stable")):
        budgets[label] = min(sizes[label], rest // (len(sizes) - done))
        rest -= budgets[label]
    kept: set[int] = set()
    for label, budget in enumerate(budgets):
        pool = left[labels[left] == label]
        if len(pool) <= k:
            assert budget == len(pool), "otherwise the public code draws at random"
            kept |= set(pool.tolist())
            continue
        distances = dense_distances(x[pool])
        connect = np.zeros((len(pool), len(pool)))
        for i, j in np.argwhere(graph_by_hand(x[pool], k)):
            connect[i, j] = np.exp(-distances[i, j]) * max(forgetting[pool][j], 1e-7)
        density = connect.sum(1) + forgetting[pool]
        batch: list[int] = []
        while len(batch) < budget:
            best = int(np.argmax(density))
            near = connect[best] > 0
            density[near] -= np.exp(-distances[best, near] * gamma) * density[best]
            batch.append(best)
            density[batch] = density.min() - 1
        kept |= set(pool[batch].tolist())
    return kept


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("sizes", [[100, 100, 100], [120, 100, 80], [200, 60, 40, 10]], ids=str)
def test_d2_matches_the_public_pipeline(fraction: float, sizes: list[int]) -> None:
    """Cut by the area under the margin of all samples, forgetting events with many zeros, equal budgets: overlap 1."""
    rng = np.random.default_rng(round(10 * fraction))
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(labels)
    margin = rng.normal(size=n) + 0.5 * (labels == 0)
    forgetting = np.maximum(0, rng.poisson(1.5, n) - 1).astype(float)
    x = (rng.normal(size=(n, 3)) + labels[:, None]).astype(np.float32)
    cut = 0.4 if fraction < 0.6 else 0.2
    count = round(fraction * n) // len(sizes) * len(sizes)
    options = {"cut_by": "aum", "cut": cut}
    chosen = select_subset(
        forgetting, labels, count / n, rule="d2", balance="equal", features=x, extras={"aum": -margin}, options=options
    )
    assert set(chosen.ids.tolist()) == public_pipeline(forgetting, margin, x, labels, count, cut, k=5, gamma=0.1)
    within = select_subset(forgetting, labels, count / n, rule="d2", balance="equal", features=x, options={"cut": cut})
    assert set(within.ids.tolist()) != set(chosen.ids.tolist())


def test_a_cut_by_the_margin_spares_classes_and_the_budget() -> None:
    """All samples of a class below the cut: it keeps its easiest; so much is cut that too few would remain: less is."""
    labels = np.repeat(np.arange(3), [50, 45, 5])
    aum = np.where(labels == 2, 10.0, 0.0) + np.arange(100) / 1000
    x, scores = RNG.normal(size=(100, 3)), RNG.random(100)
    keep = {"rule": "d2", "features": x, "extras": {"aum": aum}}
    for balance in ("balanced", "equal"):
        kept = select_subset(scores, labels, 0.3, balance=balance, options={"cut_by": "aum", "cut": 0.5}, **keep).ids
        assert len(kept) == 30
        assert kept[labels[kept] == 2].tolist() == [95]
    together = select_subset(
        scores, labels, 0.3, balance="unbalanced", options={"cut_by": "aum", "cut": 1}, **keep
    )  # fmt: skip
    assert together.ids.tolist() == list(range(30)), "only the 30 easiest remain"
    with pytest.raises(UsageError, match="cut_by=aum needs the area under the margin: score with the method d2"):
        select_subset(scores, labels, 0.3, rule="d2", features=x, options={"cut_by": "aum"})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_features_and_scores_of_any_dtype_give_one_subset(dtype: type) -> None:
    """Also where the rule is called directly, without the conversions of `select_subset`."""
    x = RNG.integers(-50, 50, size=(80, 6))
    scores = RNG.integers(0, 1000, 80) / 1024  # exact in half precision
    inputs = RuleInputs(scores, np.arange(80) / 80, 20, 0.25, 0, np.arange(80), x.astype(np.float32))
    inputs = replace(inputs, options=complete_options("d2", RULES["d2"].options, {"cut": 0.1}))
    expected = RULES["d2"](inputs)
    assert expected.dtype == np.int64
    kinds = replace(inputs, features=x.astype(dtype), scores=scores.astype(np.float32))
    assert (RULES["d2"](kinds) == expected).all()
    assert (nearest_neighbors(x.astype(dtype), 3)[0] == nearest_neighbors(x.astype(np.float32), 3)[0]).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 6))
def test_lazy_heap_matches_a_scan(seed: int, n: int, k: int) -> None:
    """Strong messages make u negative, so that neighbors rise again; few distinct values make ties."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2)).astype(np.float32)
    starts, ends, lengths = undirected_graph(*nearest_neighbors(x, k))
    weights = rng.choice([0.25, 0.5, 1.0], len(lengths))
    u = rng.choice([0.0, 1.0, 2.0, -1.0], n)
    ranks = rng.permutation(n)
    count = int(rng.integers(1, n + 1))
    now, alive, expected = u.copy(), np.ones(n, bool), []
    for _ in range(count):
        best = max(np.flatnonzero(alive), key=lambda i: (now[i], -ranks[i]))
        alive[best] = False
        expected.append(int(best))
        edges = slice(starts[best], starts[best + 1])
        now[ends[edges]] -= weights[edges] * now[best]
    assert select_greedily(u, starts, ends, weights, ranks, count).tolist() == expected


def test_forward_messages_match_dense_sums() -> None:
    x = RNG.normal(size=(60, 3)).astype(np.float32)
    starts, ends, lengths = undirected_graph(*nearest_neighbors(x, 5))
    s = RNG.random(60)
    expected = s + np.where(graph_by_hand(x, 5), np.exp(-dense_distances(x)), 0) @ s
    np.testing.assert_allclose(pass_messages(s, starts, ends, np.exp(-lengths)), expected, rtol=1e-6)


def test_d2_is_more_diverse_than_hard() -> None:
    """Of two tight clusters, the score alone keeps one and D2 keeps both."""
    x = np.concatenate((RNG.normal(size=(100, 4)), RNG.normal(size=(100, 4)) + 30)).astype(np.float32)
    scores = np.concatenate((1.2 + RNG.random(100) * 0.1, 1.0 + RNG.random(100) * 0.1))
    labels = np.zeros(200, np.int64)
    hard = select_subset(scores, labels, 0.2, rule="hard").ids
    varied = select_subset(scores, labels, 0.2, rule="d2", features=x, options={"cut": 0, "gamma_r": 0}).ids
    assert (hard >= 100).sum() == 0
    assert (varied >= 100).sum() >= 10


def test_cut_drops_the_hardest() -> None:
    assert default_cut(0.1) == pytest.approx(0.4)
    assert default_cut(0.7) == 0
    x = RNG.normal(size=(100, 3)).astype(np.float32)
    kept = select_subset(np.arange(100.0), np.zeros(100, np.int64), 0.1, rule="d2", features=x).ids
    assert kept.max() < 60


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_neighbors_on_gpu_equal_those_on_cpu() -> None:
    x = RNG.normal(size=(3000, 32)).astype(np.float32)
    here, there = nearest_neighbors(x, 5), nearest_neighbors(x, 5, device="cuda")
    assert (here[0] == there[0]).all()
