"""The benchmark of large data: class sizes of ImageNet, a cache and dynamics that kdfast opens, and a selection."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import bench_large
import large_data


def test_class_sizes_are_those_of_imagenet():
    sizes = large_data.class_sizes()
    assert (len(sizes), sizes.min(), sizes.max(), sizes.sum()) == (1000, 732, 1300, 1_281_167)
    assert len(np.unique(large_data.make_labels(3000))) == 3


def test_rows_select_a_tenth(tmp_path):
    bench_large.make_data(tmp_path, 1000, 8, {"cache", bench_large.DYN})
    labels = np.load(tmp_path / "labels.npy")
    rows = [bench_large.measure(name, tmp_path) for name in ("el2n", "tdds")]
    assert [row["samples"] for row in rows] == [len(labels)] * 2
    assert all(row["anon_gb"] > 0 and row["rss_gb"] > 0 and row["digest"] for row in rows)
