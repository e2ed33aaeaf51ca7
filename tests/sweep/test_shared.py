"""Images that the processes of a sweep share."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data.loaders import make_loader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source, compute_fingerprint
from kdfast.sweep.parallel.shared import share_source


def report(source: Source, file: Path) -> None:
    """Write what a process sees, then change one pixel of the memory."""
    file.write_text(json.dumps([source.fingerprint, compute_fingerprint(source.train, len(source.classes))]))
    source.train.images[0, 0, 0, 0] ^= 255


def write_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for index in range(3):
                pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.mark.parametrize("kind", ["arrays", "folder"])
def test_processes_see_the_same_memory(kind: str, tmp_path: Path) -> None:
    source = open_source("digits" if kind == "arrays" else write_folder(tmp_path / "data"))
    expected, images = source.fingerprint, source.train.read(np.arange(len(source.train)))
    loader = make_loader(source.train, "resident")
    shared = share_source(source, loader)
    assert shared is not None
    assert shared.fingerprint == expected
    assert torch.equal(loader.table, torch.from_numpy(images))
    assert np.array_equal(shared.test.read([1, 0]), source.test.read([1, 0]))
    process = multiprocessing.get_context("spawn").Process(target=report, args=(shared, tmp_path / "seen.json"))
    process.start()
    process.join()
    assert json.loads((tmp_path / "seen.json").read_text()) == [expected, expected]
    changed = images[0, 0, 0, 0] ^ 255
    assert shared.train.images[0, 0, 0, 0] == loader.table[0, 0, 0, 0] == changed
    if kind == "arrays":
        assert source.train.images[0, 0, 0, 0] == changed, "no second copy"
