"""Caches of large images: how much is kept by default, and what a cache will take."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from kdfast import estimates
from kdfast.api import teacher as api
from kdfast.data.source import ArraySplit
from kdfast.data.views import ViewSpec
from kdfast.estimates import estimate_cache, measure_cache
from kdfast.teacher.build import build_cache, row_format
from kdfast.teacher.plan import default_top_k, default_views
from kdfast.teacher.row_format import TopK

CROPS = ViewSpec(kind="crop", size=(64, 64), flip=True, crops=128)
SMALL_CROPS = dataclasses.replace(CROPS, size=(32, 32))
SHIFTS = ViewSpec(kind="shift", size=(32, 32), pad=4, flip=True)


@pytest.mark.parametrize(("spec", "views"), [(CROPS, 50), (dataclasses.replace(CROPS, crops=20), 20),
                                             (SMALL_CROPS, 128), (SHIFTS, 162)])  # fmt: skip
def test_default_views(spec, views):
    assert default_views(spec) == views


@pytest.mark.parametrize(("spec", "classes", "k"), [(CROPS, 1000, 10), (CROPS, 22, 10), (CROPS, 21, 0),
                                                    (SMALL_CROPS, 1000, 0), (SHIFTS, 1000, 0)])  # fmt: skip
def test_default_classes(spec, classes, k):
    assert default_top_k(spec, classes) == k


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"n_views": 50, "top_k": TopK(10, 4.0), "kind": "logits"}),
        ({"views": 0, "top_k": 0}, {"n_views": 128, "top_k": None}),
        ({"views": 3, "top_k": TopK(5, (1.0, 2.0))}, {"n_views": 3, "top_k": TopK(5, (1.0, 2.0))}),
        ({"top_k": 7}, {"top_k": TopK(7, 4.0)}),
        ({"kind": "features"}, {"n_views": 50, "top_k": None, "kind": "features"}),
    ],
    ids=str,
)
def test_a_call_without_options_has_the_defaults(source, teacher, tmp_path, monkeypatch, given, expected):
    passed = {}

    def record(*_, **options):
        passed.update(options)
        raise KeyboardInterrupt  # nothing is built

    monkeypatch.setattr(api, "build_cache", record)
    names = tuple(map(str, range(30)))
    large = dataclasses.replace(source, view_spec=CROPS, classes=names)
    model = dataclasses.replace(teacher, classes=30, class_names=names)
    monkeypatch.setattr(api, "load_teacher", lambda *_, **__: model)
    with pytest.raises(KeyboardInterrupt):
        api.cache(large, model, tmp_path / "c", **given)
    assert {name: passed[name] for name in expected} == expected


@pytest.mark.parametrize("options", [{}, {"top_k": TopK(2, (1.0, 4.0))}, {"kind": "features"}], ids=str)
@pytest.mark.parametrize("ids", [None, np.arange(7, 20)], ids=["whole", "part"])
def test_measured_bytes_are_those_of_the_files(source, teacher, tmp_path, options, ids):
    rows = row_format(teacher, "float16", **options)
    count = 60 if ids is None else len(ids)
    size = measure_cache(teacher, source, samples=count, n_views=3, rows=rows)
    build_cache(source, teacher, tmp_path / "c", n_views=3, ids=ids, **options)
    found = {path.name.replace("00000", "*"): path.stat().st_size for path in (tmp_path / "c").glob("*.npy")}
    assert size.files.keys() == found.keys()
    for name, planned in size.files.items():
        assert 0 < found[name] - planned <= 192, name  # the header
    assert size.temporary == size.files["identity_logits.npy"] + size.files["features.npy"]


def test_a_teacher_on_another_device_is_measured_there(source, teacher):
    rows = row_format(teacher, "float16")
    expected = measure_cache(teacher, source, samples=7, n_views=3, rows=rows)
    moved = dataclasses.replace(teacher, net=copy.deepcopy(teacher.net).to("meta"))
    assert measure_cache(moved, source, samples=7, n_views=3, rows=rows) == expected


class Clock:
    """A clock that only `wait` moves."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


CLOCK = Clock()


class SlowSplit(ArraySplit):
    """A split that takes 2 ms for each image."""

    def read(self, ids):
        CLOCK.wait(0.002 * len(ids))
        return super().read(ids)


class SlowPredictor:
    """Takes 0.5 ms for a view."""

    def __init__(self, *_):
        self.device = torch.device("cpu")

    def predict_identity(self, images, ids):
        CLOCK.wait(0.0005 * len(ids))
        return torch.zeros(len(ids), 4), torch.zeros(len(ids), 64)

    def predict_views(self, images, view_ids, ids, precision):
        CLOCK.wait(0.0005 * view_ids.size)
        return torch.zeros(*view_ids.shape, 4)


def test_the_time_counts_reading_and_all_views(source, teacher, monkeypatch):
    monkeypatch.setattr(estimates, "Predictor", SlowPredictor)
    monkeypatch.setattr(estimates, "time", CLOCK)
    images = np.zeros((1000, 8, 8, 3), np.uint8)
    slow = dataclasses.replace(source, train=SlowSplit(images, np.arange(1000) % 4, "slow"))
    rows = row_format(teacher, "float16")
    options = {"n_views": 9, "rows": rows, "precision": "float32", "batch_size": 64}
    found = estimate_cache(slow, teacher, torch.device("cpu"), ids=np.arange(1000), **options)
    assert found == pytest.approx(1000 * (0.002 + 9 * 0.0005), rel=0.01)
    few = estimate_cache(slow, teacher, torch.device("cpu"), ids=np.arange(100), **options)
    assert few is None
