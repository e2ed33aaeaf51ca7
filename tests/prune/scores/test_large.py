"""Splits that exceed the memory: blocks, samples and approximations against plain computations."""

import dataclasses

import numpy as np
import pytest
import torch

from kdfast.data.arrays import gather_groups, group_by_class
from kdfast.data.holdout import stratified_sample
from kdfast.errors import UsageError
from kdfast.files.arrays import map_read_only, release_pages, row_blocks
from kdfast.ops.softmax_head import head_self_influence
from kdfast.pruning.rules.d2_graph import nearest_neighbors
from kdfast.pruning.scores import influence as influence_module
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.influence import draw_holdout
from kdfast.pruning.scores.registry import compute_score
from kdfast.pruning.scores.sampled_head import exact_method
from kdfast.pruning.scores.trajectory import sample_blocks

N, CLASSES, DEPTH = 240, 5, 6


@pytest.fixture
def cached():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, N)
    features = (rng.normal(size=(CLASSES, DEPTH))[labels] + rng.normal(size=(N, DEPTH))).astype(np.float32)
    logits = (features @ rng.normal(size=(DEPTH, CLASSES))).astype(np.float32)
    return ScoreInputs(labels, 3, logits, features)


def influence(inputs, **options):
    return compute_score("influence", ScoreInputs(inputs.labels, 3, inputs.logits, inputs.features, options=options))


@pytest.mark.parametrize("options", [{}, {"kind": "absolute"}, {"polish": "no"}, {"alpha": 0.5}, {"kind": "self"}])
def test_influence_of_a_sample_that_is_everything(cached, monkeypatch, options):
    expected = influence(cached, **options).values
    monkeypatch.setattr(influence_module, "LARGE", 10)
    monkeypatch.setattr(influence_module, "SAMPLE", N)
    found = influence(cached, **options)
    assert found.used["sample"] == (
        N if options.get("kind") == "self" else N - len(draw_holdout(cached.labels, 0.1, 3)[1])
    )
    np.testing.assert_allclose(found.values, expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())


def test_influence_of_a_sample_ranks_like_that_of_all(cached, monkeypatch):
    expected = influence(cached).values
    monkeypatch.setattr(influence_module, "LARGE", 10)
    monkeypatch.setattr(influence_module, "SAMPLE", N // 2)
    found = influence(cached).values
    assert np.corrcoef(expected, found)[0, 1] > 0.9


def kronecker_reference(x, z, y, l2):
    """Form the approximate Hessian as a matrix."""
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    h = np.hstack([x, np.ones((len(x), 1))])
    s = np.mean([np.diag(row) - np.outer(row, row) for row in p], axis=0)
    inverse = np.linalg.inv(np.kron(s, h.T @ h / len(x)) + l2 * np.eye(s.shape[0] * h.shape[1]))
    gradients = [np.outer(row - np.eye(len(row))[label], one).ravel() for row, label, one in zip(p, y, h, strict=True)]
    return np.array([g @ inverse @ g for g in gradients]) / len(x)


def test_kronecker_self_influence_is_that_of_the_approximate_hessian(cached):
    x, z = cached.features.astype(np.float64), cached.logits.astype(np.float64)
    found = head_self_influence(
        torch.tensor(x), torch.tensor(z), torch.tensor(cached.labels), l2=0.1, method="kronecker"
    )
    np.testing.assert_allclose(found.numpy(), kronecker_reference(x, z, cached.labels, 0.1), rtol=1e-9)


def test_streamed_kronecker_self_influence(cached, monkeypatch):
    monkeypatch.setattr(influence_module, "LARGE", 10)
    monkeypatch.setattr(influence_module, "SAMPLE", N)
    monkeypatch.setattr("kdfast.pruning.scores.sampled_head.CHOLESKY_LIMIT", 1)
    monkeypatch.setattr("kdfast.pruning.scores.sampled_head._BLOCK_ROWS", 100)
    found = influence(cached, kind="self", polish="no")
    assert found.used["hessian"] == "kronecker"
    x, z = cached.features.astype(np.float64), cached.logits.astype(np.float64)
    np.testing.assert_allclose(found.values, kronecker_reference(x, z, cached.labels, 0.1), rtol=1e-4)


@pytest.mark.parametrize("large", [False, True])
def test_the_hessian_is_that_of_the_option(cached, monkeypatch, large):
    """A head above the limit has the approximate Hessian, unless the exact one is asked for; the same below it."""
    exact = influence(cached, kind="self", polish="no")
    assert exact.used["hessian"] == "exact"
    x, z = cached.features.astype(np.float64), cached.logits.astype(np.float64)
    approximate = kronecker_reference(x, z, cached.labels, 0.1)
    assert np.abs(exact.values / approximate - 1).max() > 0.05
    if large:
        monkeypatch.setattr(influence_module, "LARGE", 10)
        monkeypatch.setattr(influence_module, "SAMPLE", N)
    found = influence(cached, kind="self", polish="no", hessian="kronecker")
    np.testing.assert_allclose(found.values, approximate, rtol=1e-4)
    monkeypatch.setattr("kdfast.pruning.scores.sampled_head.CHOLESKY_LIMIT", 1)
    assert influence(cached, kind="self", polish="no").used["hessian"] == "kronecker"
    found = influence(cached, kind="self", polish="no", hessian="exact")
    assert found.used["hessian"] == "exact"
    np.testing.assert_allclose(found.values, exact.values, rtol=1e-5)


def test_an_exact_hessian_that_does_not_fit(monkeypatch):
    monkeypatch.setattr("kdfast.pruning.scores.sampled_head.device_memory", lambda device: 10**10)
    assert exact_method(15_000, 200_000, 8, "cpu") == "cholesky"
    assert exact_method(513_000, 1000, 1, "cpu") == "cg"
    line = "for {} the Hessian must be a matrix, which takes 4,210.7 GB for a head of 513000 weights"
    for samples, processes, where in ((200_000, 1, "200000 samples"), (1000, 2, "several processes")):
        with pytest.raises(UsageError, match=line.format(where)):
            exact_method(513_000, samples, processes, "cpu")


def test_an_option_of_the_hessian_without_effect_is_refused(cached):
    with pytest.raises(UsageError, match="hessian=exact of influence has an effect only with kind=self"):
        influence(cached, hessian="exact")


def test_the_head_of_a_sample_sees_every_class(monkeypatch):
    """The largest class has two samples, one of them held out: a head without it would lack a class."""
    rng = np.random.default_rng(3)
    labels = np.append(np.arange(198) % 3, [3, 3])
    features = (np.eye(4)[labels] + rng.normal(size=(200, 4))).astype(np.float32)
    inputs = ScoreInputs(labels, 3, (3 * features).astype(np.float32), features)
    monkeypatch.setattr(influence_module, "LARGE", 10)
    monkeypatch.setattr(influence_module, "SAMPLE", 40)
    for seed in range(4):
        values = compute_score("influence", dataclasses.replace(inputs, seed=seed)).values
        assert np.isfinite(values).all()


def test_stratified_sample_takes_each_class_in_proportion():
    labels = np.repeat([0, 1, 2], [100, 50, 1])
    found = stratified_sample(labels, 31, seed=4)
    assert np.bincount(labels[found]).tolist() == [20, 10, 1]
    assert (np.diff(found) > 0).all()
    assert not np.array_equal(found, stratified_sample(labels, 31, seed=5))


def test_groups_are_gathered_together(monkeypatch):
    rng = np.random.default_rng(1)
    labels, matrix = rng.integers(0, 7, 100), rng.normal(size=(100, 3)).astype(np.float32)
    groups = group_by_class(labels)
    for limit in (1, 400, 10_000):
        monkeypatch.setattr("kdfast.data.arrays._GROUP_BYTES", limit)
        for (label, members), rows in zip(groups.items(), gather_groups(matrix, list(groups.values())), strict=True):
            np.testing.assert_array_equal(members, np.flatnonzero(labels == label))
            np.testing.assert_array_equal(rows, matrix[members])


def test_only_pages_without_changes_are_released(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(12.0).reshape(6, 2))
    changed = np.load(tmp_path / "a.npy", mmap_mode="c")
    changed[0] = -1
    release_pages(np.asarray(changed)[1:])
    assert changed[0, 0] == -1
    mapped = map_read_only(changed)
    assert mapped[0, 0] == 0
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(np.concatenate([block for _, block in row_blocks(mapped, 4)]), mapped)


@pytest.mark.parametrize("columns", [1, 7, 50, 64])
def test_neighbors_by_blocks_of_columns(columns):
    points = np.random.default_rng(2).normal(size=(64, 4)).astype(np.float32)
    points[5] = points[40]
    expected = nearest_neighbors(points, 5)
    found = nearest_neighbors(points, 5, columns=columns, block_bytes=columns * 4 * 9)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n", [1, 8, 15, 16, 17, 33, 100])
def test_blocks_of_samples_cover_all_and_are_never_single(n):
    blocks = list(sample_blocks(n, 16))
    assert np.concatenate([np.arange(n)[block] for block in blocks]).tolist() == list(range(n))
    assert all(block.start % 8 == 0 and block.stop - block.start >= min(n, 2) for block in blocks)
