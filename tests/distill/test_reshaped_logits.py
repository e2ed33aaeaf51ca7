"""Logits reshaped to the mean spread of their class, against a loop over samples and classes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.readers.registry import open_source
from kdfast.data.views import Normalization
from kdfast.distillation.config import RunConfig
from kdfast.distillation.losses.logits.reshaped import Reshaping
from kdfast.distillation.targets import CachedTargets, TeacherTargets
from kdfast.errors import CacheMismatch, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.row_format import TopK

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source():
    return open_source("digits")


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = build_net("resnet8", 10).eval()
    return Model(net, "resnet8", 10, tuple("0123456789"), Normalization((0.2, 0.3, 0.4), (0.5, 0.6, 0.7)), {})


@pytest.fixture(scope="module")
def cache(source, model: Model, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    out: Path = tmp_path_factory.mktemp("reshaped") / "cache"
    build_cache(source, model, out, n_views=2, dtype="float32")
    return TeacherCache.open(out, source=source, teacher=model)


def deviation(row: list[float]) -> float:
    """Return the unbiased standard deviation."""
    mean = math.fsum(row) / len(row)
    return math.sqrt(math.fsum((z - mean) ** 2 for z in row) / (len(row) - 1))


def test_each_row_gets_the_mean_spread_of_its_class(source, cache: TeacherCache) -> None:
    labels = source.train.labels
    spreads: dict[int, list[float]] = {}
    for row, label in zip(cache.identity_logits().tolist(), labels.tolist(), strict=True):
        spreads.setdefault(label, []).append(deviation(row))
    ids = np.array([5, 900, 17, 44], np.int64)
    views = np.array([1, 0, 1, 1], np.int64)
    plain = cache.lookup(ids, views).tolist()
    config = RunConfig("resnet8", alpha=0.5, views=2, view_seed=0, reshape_logits=True)
    targets = TeacherTargets(cache=cache).open(source, ids, config, CPU)
    assert isinstance(targets, CachedTargets)
    targets.begin_epoch(ids, views)
    found = targets.batch(0, 4)
    assert isinstance(found, torch.Tensor)
    for row, before, i in zip(found.tolist(), plain, ids.tolist(), strict=True):
        spread = math.fsum(spreads[int(labels[i])]) / len(spreads[int(labels[i])])
        expected = [z * spread / deviation(before) for z in before]
        np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_equal_logits_stay_as_they_are_and_the_dtype_too() -> None:
    reshaping = Reshaping(np.array([2.0, 3.0]), np.array([0, 1, 1]))
    logits = torch.tensor([[1, 1, 1], [0, 1, 2]], dtype=torch.float16)
    found = reshaping(logits, np.array([0, 2]))
    assert found.dtype == torch.float16
    assert found.tolist() == [[1, 1, 1], [0, 3, 6]]


def test_a_run_without_it_keeps_its_identity() -> None:
    assert "reshape_logits" not in RunConfig("resnet8").to_dict()
    assert RunConfig("resnet8", reshape_logits=True).to_dict()["reshape_logits"] is True


def test_refuses_what_lacks_the_statistics(source, model: Model, tmp_path: Path) -> None:
    config = RunConfig("resnet8", alpha=0.5, views=1, view_seed=0, reshape_logits=True)
    ids = np.arange(20, dtype=np.int64)
    for teacher in (TeacherTargets(), TeacherTargets(model=model)):
        with pytest.raises(UsageError, match="`reshape_logits` changes the logits of a teacher's cache"):
            teacher.open(source, ids, config, CPU)
    for name, options, message in (
        ("part", {"ids": ids}, r"covers 20 of 1442: build a cache on these samples or on all"),
        ("top", {"top_k": TopK(3, 4.0)}, "3 most probable classes, and `reshape_logits` needs all"),
    ):
        build_cache(source, model, tmp_path / name, n_views=1, **options)
        opened = TeacherCache.open(tmp_path / name)
        with pytest.raises(CacheMismatch, match=message):
            TeacherTargets(cache=opened).open(source, ids, config, CPU)
