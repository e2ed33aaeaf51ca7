"""A teacher's cache at full size: build it, open it with every SHA-256 checked, and look up random rows.

The size is that of CIFAR-100: 50,000 samples x 162 views x 100 classes, 1.62 GB of float16. Random numbers replace the
teacher, so that only the cache is timed. Needs 2 GB of free disk: `pytest bench/bench_cache.py`.
"""

import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from kdfast.data.source import ArraySplit, Source
from kdfast.data.views import Normalization, ViewSpec
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache

SAMPLES, CLASSES = 50_000, 100
VIEWS = ViewSpec(kind="shift", size=(32, 32), pad=4, flip=True)
MIB = 1 << 20


class RandomPredictor:
    """Replaces the teacher by slices of one block of random numbers, at almost no cost."""

    def __init__(self, model, spec, device, batch_size):
        self.device = device
        self._pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 5

    def predict_identity(self, images, ids):
        """See `Predictor`."""
        return self._take(ids, CLASSES), self._take(ids, 64)

    def predict_views(self, images, view_ids, ids, precision):
        """See `Predictor`."""
        return self._take(ids, view_ids.shape[1] * CLASSES).reshape(*view_ids.shape, CLASSES)

    def _take(self, ids, width):
        return torch.stack([self._pool[i * 37 % 3_000_000 :][:width] for i in ids.tolist()])


@pytest.fixture(scope="module")
def source():
    draw = np.random.default_rng(0)

    def split(count, name):
        images = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return ArraySplit(images, draw.integers(0, CLASSES, count), name)

    names = tuple(map(str, range(CLASSES)))
    return Source("synthetic", "datasets", names, split(SAMPLES, "train"), split(200, "test"), VIEWS)


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "full"
    norm = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = Model(build_net("resnet8", CLASSES).eval(), "resnet8", CLASSES, source.classes, norm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdfast.teacher.build.Predictor", RandomPredictor)
        began = time.perf_counter()
        build_cache(source, model, path)
    return path, time.perf_counter() - began


class PeakMemory:
    """Peak and final resident memory of the `with` block, in MiB above its start."""

    def __enter__(self):
        self._process, self._stop = psutil.Process(), threading.Event()
        self._start = self._highest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.kept = (self._process.memory_info().rss - self._start) / MIB
        self.peak = (self._highest - self._start) / MIB

    def _sample(self):
        while not self._stop.wait(0.001):
            self._highest = max(self._highest, self._process.memory_info().rss)


@pytest.mark.benchmark(group="cache: open")
def test_open_with_all_files_verified(benchmark, built):
    path, build_seconds = built
    size = sum(file.stat().st_size for file in Path(path).iterdir())
    with PeakMemory() as memory:
        benchmark.pedantic(TeacherCache.open, args=(path,), rounds=3, warmup_rounds=1)
    benchmark.extra_info |= {
        "bytes": size,
        "write_rows_per_s": SAMPLES * VIEWS.count / build_seconds,
        "rss_peak_mib": memory.peak,
    }
    assert size > 1.6e9
    assert memory.peak < 100


@pytest.mark.benchmark(group="cache: lookup")
@pytest.mark.parametrize("window", [1024, 8192, 50_000])
def test_lookup_of_random_rows(benchmark, built, source, window):
    path, _ = built
    cache = TeacherCache.open(path, source=source, check_files=False)
    draw = np.random.default_rng(1)
    ids, view_indices = draw.integers(0, SAMPLES, 300), draw.integers(0, VIEWS.count, 300)
    shards = [np.load(file, mmap_mode="r") for file in sorted(path.glob("logits-*"))]
    size = shards[0].shape[1]
    expected = [shards[i // size][view_index, i % size] for i, view_index in zip(ids, view_indices, strict=True)]
    assert (cache.lookup(ids, view_indices).numpy() == expected).all()
    del shards, expected

    def arguments():
        ids = draw.permutation(SAMPLES)[:window]
        return (ids, draw.integers(0, VIEWS.count, window)), {}

    with PeakMemory() as memory:
        benchmark.pedantic(cache.lookup, setup=arguments, rounds=10, warmup_rounds=1)
    rate = window / benchmark.stats.stats.median
    benchmark.extra_info |= {"rows_per_s": rate, "rss_peak_mib": memory.peak, "rss_kept_mib": memory.kept}
    assert memory.kept < 64
