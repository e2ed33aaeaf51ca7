"""Caches of the classifier's inputs: exact logits from them, at any temperature, in the loss and for scores."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.distillation.losses.logits.reshaped import Reshaping
from kdfast.distillation.targets import CachedTargets
from kdfast.errors import CacheMismatch, UsageError
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.row_format import TopK
from kdfast.teacher.verify import verify_cache

IDS, VIEW_INDICES = np.arange(60)[::-1].copy(), np.arange(60) % 9
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def logits(source, teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "logits"
    build_cache(source, teacher, path, dtype="float32")
    return TeacherCache.open(path)


@pytest.fixture(scope="module")
def cache(source, teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "features"
    build_cache(source, teacher, path, kind="features", shard_bytes=9 * 64 * 2 * 13)
    return TeacherCache.open(path, source=source, teacher=teacher)


def test_rows_are_the_features_of_each_view(source, teacher, cache):
    assert len(list(cache.path.glob("logits-*.npy"))) == 5
    assert cache.row_bytes == 64 * 2
    rows = cache.lookup_rows(np.arange(60), np.full(60, cache.spec.identity))
    assert rows.dtype == torch.float16
    torch.testing.assert_close(rows.float(), torch.from_numpy(cache.features()), rtol=2**-10, atol=1e-6)


def test_logits_are_exact_up_to_the_rounding_of_features(teacher, cache, logits):
    found, expected = cache.lookup(IDS, VIEW_INDICES), logits.lookup(IDS, VIEW_INDICES)
    assert found.dtype == torch.float32
    weight, bias = teacher.net.fc.weight.detach(), teacher.net.fc.bias.detach()
    rows = cache.lookup_rows(IDS, VIEW_INDICES).double()
    torch.testing.assert_close(found.double(), rows @ weight.double().T + bias.double(), rtol=1e-5, atol=1e-5)
    bound = 2**-11 * rows.abs().float() @ weight.abs().T + 1e-3
    assert ((found - expected).abs() <= bound).all()


def test_scores_read_the_same_arrays(cache, logits):
    assert np.array_equal(cache.identity_logits(), logits.identity_logits())
    assert np.array_equal(cache.features(), logits.features())


@pytest.mark.parametrize("n_views", [1, 9])
def test_targets_of_a_run_are_the_logits(cache, n_views):
    targets = CachedTargets(cache, IDS, n_views, 0, CPU, temperature=2.5)
    indices = VIEW_INDICES % n_views
    targets.begin_epoch(IDS, indices)
    found = torch.cat([targets.batch(start, 20) for start in range(0, 60, 20)])
    views = indices if n_views == 9 else np.full(60, cache.spec.identity)
    torch.testing.assert_close(found, cache.lookup(IDS, views), rtol=1e-6, atol=1e-5)


def test_targets_can_be_reshaped(source, cache):
    reshaping = Reshaping.of_cache(cache, source.train.labels)
    targets = CachedTargets(cache, IDS, 9, 0, CPU, reshaping=reshaping)
    targets.begin_epoch(IDS, VIEW_INDICES)
    expected = reshaping(cache.lookup(IDS, VIEW_INDICES), IDS)
    torch.testing.assert_close(targets.batch(0, 60), expected, rtol=1e-6, atol=1e-5)


def test_verify_passes_and_detects_changes(source, teacher, cache, tmp_path):
    assert verify_cache(cache, source, teacher, samples=60).passed
    copy = shutil.copytree(cache.path, tmp_path / "copy")
    for path in copy.glob("logits-*.npy"):
        np.save(path, np.load(path) + np.float16(0.05))
    with pytest.raises(CacheMismatch, match="differ by up to"):
        verify_cache(TeacherCache.open(copy, check_files=False), source, teacher, samples=60)


def test_opening_checks_the_classifier(cache, tmp_path):
    copy = shutil.copytree(cache.path, tmp_path / "copy")
    (copy / "classifier.npy").write_bytes(b"")
    with pytest.raises(CacheMismatch, match=r"classifier\.npy has 0 bytes"):
        TeacherCache.open(copy)


def test_a_build_of_another_kind_does_not_resume(source, teacher, cache, logits):
    with pytest.raises(CacheMismatch, match='kind is "features", expected "logits"'):
        build_cache(source, teacher, cache.path)
    with pytest.raises(CacheMismatch, match='kind is "logits", expected "features"'):
        build_cache(source, teacher, logits.path, kind="features", dtype="float32")
    assert build_cache(source, teacher, cache.path, kind="features", shard_bytes=9 * 64 * 2 * 13).computed == 0


class Scaled(nn.Module):
    """A network whose logits are not the output of its last linear layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        return 2 * self.fc(x.mean((2, 3)))


class Convolutional(nn.Module):
    """A network without a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("net", [Scaled(), Convolutional()])
def test_rejects_networks_with_another_head(source, teacher, tmp_path, net):
    model = Model(net.eval(), "own", 4, teacher.class_names, teacher.normalization)
    with pytest.raises(UsageError, match="logits of own are not those of one last linear layer"):
        build_cache(source, model, tmp_path / "c", kind="features")
    assert not (tmp_path / "c").exists()


def test_rejects_other_kinds_and_top_k(source, teacher, tmp_path):
    with pytest.raises(UsageError, match="`kind` is 'hidden': pass one of logits, features"):
        build_cache(source, teacher, tmp_path / "c", kind="hidden")
    with pytest.raises(UsageError, match="`top_k` chooses among logits"):
        build_cache(source, teacher, tmp_path / "c", kind="features", top_k=TopK(2, 1.0))
