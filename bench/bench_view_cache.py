"""A cache of the 10 most probable of 1,000 classes, 4 crops of each of 1.28 million samples: write, verify, read.

`python bench/bench_view_cache.py` writes results/view_cache.json; `--samples` shrinks it. Slices of a block of random
numbers replace the teacher, so that only the cache is timed. It is read as training reads it: epochs of a subset in
random order, each sample in the view that is drawn for it, a window at a time, a batch after the other. Seconds of the
process's CPU time are beside those of the clock, which other work on the machine lengthens. Needs 11 GB of disk, most
of it for the logits of all classes of the unaugmented images, in parts and put together.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import numpy as np
import torch

from kdfast.data.order import epoch_order
from kdfast.data.source import Source
from kdfast.data.views import Normalization, ViewSpec, draw_view_indices, view_table
from kdfast.distillation.targets import CachedTargets
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.plan import is_finished
from kdfast.teacher.row_format import TopK

SAMPLES, CLASSES, VIEWS, DEPTH = 1_280_000, 1000, 4, 16
SPEC = ViewSpec(kind="crop", size=(8, 8), flip=True, crops=50)
TOP_K = TopK(10, 4.0)
BATCH, EPOCHS = 256, 3


class BlankImages:
    """A split of black images with random labels."""

    shape = (8, 8, 3)

    def __init__(self, count: int) -> None:
        self.labels = np.random.default_rng(0).integers(0, CLASSES, count)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """See `Split`."""
        return np.zeros((len(ids), *self.shape), np.uint8)


class RandomPredictor:
    """Replaces the teacher: logits are slices of random numbers, chosen by sample and view."""

    def __init__(self, model: Model, spec: ViewSpec, device: torch.device, batch_size: int) -> None:
        self.device = device
        pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 3
        self._rows = pool.unfold(0, CLASSES, 1)

    def predict_identity(self, images: torch.Tensor, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Predictor`."""
        logits = self.predict_views(images, np.full((len(ids), 1), SPEC.identity), ids, "float32")[:, 0]
        return logits, logits[:, :DEPTH].clone()

    def predict_views(
        self, images: torch.Tensor, view_ids: np.ndarray, ids: np.ndarray, precision: str
    ) -> torch.Tensor:
        """See `Predictor`."""
        at = torch.from_numpy((ids[:, None] * 37 + view_ids * 1009) % len(self._rows))
        return self._rows[at.reshape(-1)].reshape(*view_ids.shape, CLASSES)


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return a call's result, and its seconds by the clock and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def check_rows(cache: TeacherCache, predictor: RandomPredictor, count: int = 500) -> None:
    """Compare random rows with the definition, in float64."""
    draw = np.random.default_rng(1)
    ids, indices = draw.choice(len(cache), min(count, len(cache)), replace=False), draw.integers(0, VIEWS, count)
    indices = indices[: len(ids)]
    found = cache.lookup_top_k(ids, indices, TOP_K.temperatures[0])
    views = view_table(SPEC, 0, ids, VIEWS)[np.arange(len(ids)), indices]
    logits = predictor.predict_views(torch.empty(0), views[:, None], ids, "float32")[:, 0].double().numpy()
    for row, kept, values, tail in zip(logits, found.classes, found.values, found.tail, strict=True):
        expected = np.argsort(-row)[: TOP_K.k]
        rest = np.log(np.exp(np.delete(row, expected) / TOP_K.temperatures[0]).sum())
        assert kept.tolist() == expected.tolist() or np.allclose(row[kept], row[expected])
        np.testing.assert_allclose(values, row[kept], rtol=2**-11)
        np.testing.assert_allclose(tail, rest, rtol=2**-11)


def read_epochs(cache: TeacherCache, ids: np.ndarray) -> dict[str, float]:
    """Read epochs of these samples as training does; return the rows per second of the median epoch."""
    targets = CachedTargets(cache, ids, VIEWS, 0, torch.device("cpu"), temperature=TOP_K.temperatures[0])
    runs = []
    for epoch in range(EPOCHS):
        order = epoch_order(ids, 0, epoch)
        indices = draw_view_indices(0, epoch, order, VIEWS)

        def read(order: np.ndarray = order, indices: np.ndarray = indices) -> None:
            targets.begin_epoch(order, indices)
            for start in range(0, len(order), BATCH):
                targets.batch(start, min(BATCH, len(order) - start))

        runs.append(timed(read)[1])
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    return {
        "rows_per_s": round(len(ids) / middle["seconds"]),
        "rows_per_cpu_s": round(len(ids) / middle["cpu_seconds"]),
    }


def measure(samples: int, folder: Path) -> list[dict[str, Any]]:
    """Write, verify and read a cache; one that is there is only verified and read."""
    names = tuple(map(str, range(CLASSES)))
    source = Source("synthetic", "datasets", names, BlankImages(samples), BlankImages(BATCH), SPEC)
    torch.manual_seed(0)
    norm = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = Model(build_net("resnet8", CLASSES).eval(), "resnet8", CLASSES, names, norm)
    was_there = is_finished(folder)
    with mock.patch("kdfast.teacher.build.Predictor", RandomPredictor):
        _, written = timed(lambda: build_cache(source, model, folder, n_views=VIEWS, top_k=TOP_K))
    cache, opened = timed(lambda: TeacherCache.open(folder, source=source))
    check_rows(cache, RandomPredictor(model, SPEC, torch.device("cpu"), 1))
    size = sum(path.stat().st_size for path in folder.glob("logits-*.npy"))
    whole = sum(path.stat().st_size for path in folder.iterdir())
    rows = samples * VIEWS
    result: list[dict[str, Any]] = [] if was_there else [
        {"step": "write", **written, "rows_per_s": round(rows / written["seconds"]),
         "rows_per_cpu_s": round(rows / written["cpu_seconds"])},
    ]  # fmt: skip
    result.append({"step": "open, every file verified", **opened, "bytes_of_views": size, "bytes": whole})
    draw = np.random.default_rng(2)
    for fraction in (1.0, 0.1):
        ids = np.sort(draw.permutation(samples)[: round(samples * fraction)])
        result.append({"step": "read", "fraction": fraction, **read_epochs(cache, ids)})
    return result


def main(arguments: list[str] | None = None) -> Path:
    """Measure and write the result; return its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument(
        "--folder", type=Path, help="cache to write and keep, or to read again; default: a temporary one"
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(given.samples, given.folder or Path(folder) / "cache")
    for row in rows:
        print(row)
    return harness.write_results("view_cache", rows, samples=given.samples, views=VIEWS, classes=CLASSES, top_k=10)


if __name__ == "__main__":
    main()
