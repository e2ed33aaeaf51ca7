"""A search on a sample of the data, and scores from a stream over the cache."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdfast.data.holdout import stratified_sample
from kdfast.errors import UsageError
from kdfast.pruning.if_beta import IFBeta
from kdfast.pruning.if_beta.proxy import Projection, ProxyTrainingConfig
from kdfast.pruning.if_beta.scores import SAMPLE_SCORES, HeadInputs, mean_logits
from kdfast.pruning.if_beta.search import Schedule
from kdfast.pruning.if_beta.selector import large
from kdfast.pruning.if_beta.selector import select as selector
from kdfast.pruning.if_beta.selector.presets import OPTIONS
from kdfast.pruning.options import complete_options
from kdfast.pruning.selector import SelectorInputs

QUICK = IFBeta(proxy=Projection(4), budget=ProxyTrainingConfig(steps=5, batch_size=16), schedule=Schedule(steps=1))


def fit(cloud, rows=None, learner=QUICK, **more):
    given = slice(None) if rows is None else rows
    settings = {"scores": cloud.scores, "rows": rows, **more}
    return learner.fit(cloud.logits[given], cloud.features[given], cloud.labels, 0.2, 0, **settings)


def test_a_sample_of_everything_is_no_sample(cloud):
    everything = np.arange(len(cloud.labels))
    a, b = fit(cloud), fit(cloud, everything)
    assert (a.learned, a.rewards) == (b.learned, b.rewards)
    np.testing.assert_array_equal(a.ids, b.ids)


def test_the_subset_is_of_all_samples(cloud):
    found = fit(cloud, stratified_sample(cloud.labels, 300))
    assert (len(found.ids), len(found.u)) == (240, 1200)
    assert np.bincount(cloud.labels[found.ids]).tolist() == [80] * 3


@pytest.mark.parametrize("wrong", [{"scores": None}, {"learner": dataclasses.replace(QUICK, candidates=2)}])
def test_a_sample_needs_scores_and_one_candidate(cloud, wrong):
    with pytest.raises(UsageError, match="a search on a sample"):
        fit(cloud, np.arange(600), **wrong)


class Cache(SimpleNamespace):
    """Two views in memory."""

    def __len__(self):
        return len(self.views[0])

    def lookup(self, ids, views):
        return torch.stack([self.views[view][i] for i, view in zip(ids, views, strict=True)])

    def identity_logits(self):
        return self.views[0].numpy()

    def features(self):
        return self.rows.numpy()


@pytest.mark.parametrize("score", ["self", "residual"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_streamed_scores(cloud, monkeypatch, score, top_k):
    monkeypatch.setattr("kdfast.pruning.scores.sampled_head._BLOCK_ROWS", 500)
    monkeypatch.setattr(large, "SAMPLE", len(cloud.labels))
    views = [cloud.logits, cloud.logits + 0.3 * torch.randn(cloud.logits.shape)]
    cache = Cache(views=views, rows=cloud.features, top_k=top_k)
    source = SimpleNamespace(train=SimpleNamespace(labels=cloud.labels))
    inputs = SelectorInputs(source, cache, 0.1, "balanced", 0, {"score": score})
    logits = mean_logits(views) if top_k is None else cloud.logits
    expected = SAMPLE_SCORES[score](HeadInputs(logits, cloud.features, torch.tensor(cloud.labels), np.arange(60)))
    np.testing.assert_allclose(large.streamed_scores(inputs, 2), expected, rtol=1e-5)


def test_scores_that_need_all_samples_in_memory_are_refused(cloud):
    cache = Cache(views=[cloud.logits], rows=cloud.features, top_k=None)
    source = SimpleNamespace(train=SimpleNamespace(labels=cloud.labels))
    with pytest.raises(UsageError, match="the score crossfit fits heads to all of 1200 samples"):
        large.streamed_scores(SelectorInputs(source, cache, 0.1, "balanced", 0, {"score": "crossfit"}), 1)


@pytest.fixture
def large_split(cloud, monkeypatch):
    """Inputs of the selector on a split above the limit, which takes a sample."""
    for name, value in {"LARGE": 100, "SAMPLE": 300}.items():
        monkeypatch.setattr(selector, name, value)
    monkeypatch.setattr(large, "SAMPLE", 300)
    monkeypatch.setattr(selector, "measure_costs", lambda inputs, result: {"score_seconds": result.score_seconds})
    cache = Cache(views=[cloud.logits], rows=cloud.features, top_k=None, n_views=1, path="cache")
    source = SimpleNamespace(train=SimpleNamespace(labels=cloud.labels))
    chosen = complete_options("if-beta", OPTIONS["kdfast"], {"steps": 1, "inner_steps": 5})
    return SelectorInputs(source, cache, 0.2, "balanced", 0, chosen)


@pytest.mark.parametrize(("limit", "hessian"), [(10_000, None), (10, "kronecker")])
def test_the_record_of_a_large_split(large_split, monkeypatch, limit, hessian):
    monkeypatch.setattr("kdfast.pruning.scores.sampled_head.CHOLESKY_LIMIT", limit)
    scores = large.streamed_scores
    monkeypatch.setattr(selector, "streamed_scores", lambda *given: (time.sleep(0.2), scores(*given))[1])
    ids, record = selector.select(large_split)
    assert len(ids) == 240
    assert record["searched"] == 300
    assert record.get("influence_hessian") == hessian
    assert record["score_seconds"] >= 0.2


def test_several_draws_of_a_large_split_are_refused_before_the_scores(large_split, monkeypatch):
    monkeypatch.setattr(selector, "streamed_scores", lambda *_: pytest.fail("scores were computed"))
    options = {**large_split.options, "candidates": 3}
    with pytest.raises(UsageError, match="option candidates=3: of more than 100 samples, the search sees a sample"):
        selector.select(dataclasses.replace(large_split, options=options))
