"""A search on a sample of the data, and scores from a stream over the cache."""

import dataclasses
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
