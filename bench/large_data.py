"""Synthetic data of ImageNet's shape for `bench_large.py`: labels, a teacher's cache and recorded dynamics, no images.

The classes have 732 to 1,300 samples each, as in ImageNet, and 1,281,167 in all; fewer samples are fewer classes of the
same sizes, while the logits keep a column for every class. The samples are in random order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.data.source import Source
from kdfast.data.views import ViewSpec
from kdfast.dynamics import format as dynamics_format
from kdfast.files import sha256_file, write_sealed
from kdfast.teacher.manifest import FEATURES, IDENTITY, shard_file
from kdfast.teacher.plan import make_plan
from kdfast.teacher.row_format import RowFormat, TopK
from kdfast.teacher.writing.finish import seal_cache

CLASSES, SMALLEST, LARGEST, FULL = 1000, 732, 1300, 1_281_167
_FULL_CLASSES = 895  # classes of 1,300 samples
_BLOCK = 1 << 15  # rows computed at a time
_WRONG = 0.02  # share of wrong labels
_TOP_K = 5
_DIGEST = "0" * 63 + "1"


def class_sizes() -> np.ndarray:
    """Return the sizes of all 1,000 classes, in random order: 895 of 1,300, the others from 732 up."""
    others = CLASSES - _FULL_CLASSES
    share = (FULL - _FULL_CLASSES * LARGEST - others * SMALLEST) / (others * (LARGEST - SMALLEST))
    steps = np.linspace(0, 1, others) ** (1 / share - 1)  # of this mean
    sizes = np.concatenate((np.full(_FULL_CLASSES, LARGEST), SMALLEST + steps * (LARGEST - SMALLEST)))
    sizes = np.floor(sizes).astype(np.int64)
    middle = sizes[_FULL_CLASSES + 1 : -1]
    all_get, more = divmod(FULL - int(sizes.sum()), len(middle))
    middle += all_get
    middle[:more] += 1
    return np.random.default_rng(0).permutation(sizes)


def make_labels(samples: int) -> np.ndarray:
    """Return labels, int64 (about `samples`,): all samples of as many classes as it takes, shuffled."""
    sizes = class_sizes()
    classes = min(CLASSES, int(np.searchsorted(np.cumsum(sizes), samples)) + 1)
    # The last classes, so that a head that counts classes by the largest label has all 1,000.
    return np.random.default_rng(1).permutation(np.repeat(CLASSES - 1 - np.arange(classes), sizes[:classes]))


class _NoImages:
    """Labels without images."""

    shape = (224, 224, 3)

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: Any) -> Any:
        raise NotImplementedError("this data has no images")


def make_source(labels: np.ndarray) -> Source:
    split = _NoImages(labels)
    names = tuple(f"class {label}" for label in range(CLASSES))
    spec = ViewSpec("crop", (224, 224), flip=True, crops=8)
    return Source("synthetic", "synthetic", names, split, split, spec, recorded=_DIGEST)


def _outputs(labels: np.ndarray, depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield features (b, depth), rectified like those of a pooled layer, and the logits of a linear head on them."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, depth, generator=generator)
    head = centers * (8 / depth)
    rng = np.random.default_rng(2)
    for start in range(0, len(labels), _BLOCK):
        true = labels[start : start + _BLOCK].copy()
        wrong = rng.random(len(true)) < _WRONG
        true[wrong] = rng.integers(0, CLASSES, int(wrong.sum()))
        noise = torch.randn(len(true), depth, generator=generator)
        scale = torch.rand(len(true), 1, generator=generator) * 2.5 + 0.5
        features = (centers[torch.from_numpy(true)] + scale * noise).relu()
        yield features.numpy(), (features @ head.T).numpy()


def make_cache(folder: Path, source: Source, depth: int) -> None:
    """Write a cache of one view: logits and features in float32, and the ten most probable classes."""
    labels, rows = source.train.labels, RowFormat(CLASSES, np.dtype(np.float16), TopK(10, 4.0))
    folder.mkdir(parents=True)
    started, right, names = time.perf_counter(), 0, []
    with (folder / IDENTITY).open("wb") as identity, (folder / FEATURES).open("wb") as held:
        for file, width in ((identity, CLASSES), (held, depth)):
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(labels), width)}
            np.lib.format.write_array_header_1_0(file, header)
        for number, (features, logits) in enumerate(_outputs(labels, depth)):
            identity.write(logits.data)
            held.write(features.data)
            names.append(shard_file(number))
            np.save(folder / names[-1], rows.pack(logits)[None])
            right += int((logits.argmax(1) == labels[number * _BLOCK :][: len(logits)]).sum())
    teacher = {"net": "synthetic", "digest": _DIGEST, "mean": [0.0] * 3, "std": [1.0] * 3}
    plan = make_plan(source, teacher, np.arange(len(labels)), 1, 0)
    plan |= {"dtype": "float16", "precision": "float32", "top_k": TopK(10, 4.0).to_dict(), "per_shard": _BLOCK}
    digests = {name: sha256_file(folder / name) for name in (*names, IDENTITY, FEATURES)}
    results = {"train_top1": 100 * float(right) / len(labels), "test_top1": None, "features": depth}
    seal_cache(folder, plan, results, digests, seconds=time.perf_counter() - started, images=len(labels))


def make_dynamics(folder: Path, source: Source, epochs: int, runs: int = 1) -> None:
    """Write recorded dynamics of `runs` runs, each of which trained on another half of the samples if there are two."""
    labels = source.train.labels
    folder.mkdir(parents=True)
    np.save(folder / dynamics_format.LABELS, labels)
    half = np.random.default_rng(3).random(len(labels)) < 0.5
    seals = []
    for run in range(runs):
        part = folder / dynamics_format.run_folder(run)
        part.mkdir()
        _write_run(part, labels, epochs, run)
        trained = np.ones(len(labels), np.bool_) if runs == 1 else half == bool(run)
        np.save(part / dynamics_format.MASK, np.packbits(trained))
        files = dynamics_format.compute_file_digests(part, sorted(path.name for path in part.iterdir()))
        write_sealed(part / dynamics_format.SEAL, {"files": files})
        seals.append(files)
    plan = {
        "format": dynamics_format.FORMAT,
        "version": dynamics_format.VERSION,
        "samples": len(labels),
        "epochs": epochs,
        "labels": dynamics_format.labels_digest(labels),
        "fingerprint": source.fingerprint,
        "feature_epochs": [],
        "facts": {},
        "top_k": _TOP_K,
        "classes": CLASSES,
        "record": "epoch",
    }
    write_sealed(folder / dynamics_format.PLAN, plan)
    write_sealed(folder / dynamics_format.MANIFEST, {**plan, "runs": seals})


def _write_run(folder: Path, labels: np.ndarray, epochs: int, run: int) -> None:
    """Write the values of each epoch: a sample's probability rises at its own rate, with noise."""
    n, rng = len(labels), np.random.default_rng(4 + run)
    ease = rng.normal(size=n).astype(np.float32)
    shape = (epochs, n)
    values = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
        for name in dynamics_format.METRICS[dynamics_format.VERSION]
    }
    correct = np.lib.format.open_memmap(folder / f"{dynamics_format.CORRECT}.npy", "w+", np.uint8, (epochs, -(-n // 8)))
    for epoch in range(epochs):
        logit = ease + 4 * epoch / epochs + rng.normal(scale=0.7, size=n).astype(np.float32) - 1
        p = 1 / (1 + np.exp(-logit))
        for name, value in (("p_y", p), ("p_other", (1 - p) / 2), ("margin", logit), ("el2n", 1.2 * (1 - p))):
            values[name][epoch] = value
        correct[epoch] = np.packbits(logit > 0)
        best = 0.7 * p[:, None] * 0.4 ** np.arange(_TOP_K, dtype=np.float32)
        ids = (labels[:, None] + np.arange(_TOP_K) * 7 + (epoch % 3) * (logit[:, None] < 0)) % CLASSES
        for name, value in (
            (dynamics_format.TOP_IDS, ids.astype(dynamics_format.class_dtype(CLASSES))),
            (dynamics_format.TOP_P, best.astype(np.float16)),
        ):
            np.save(folder / dynamics_format.array_file(name, epoch), value)
    for array in (*values.values(), correct):
        array.flush()
