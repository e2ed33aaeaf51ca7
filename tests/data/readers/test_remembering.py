"""Fingerprints of unchanged files are not computed twice, and every change of a file is noticed."""

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.folders.image_split import ImageSplit
from kdfast.data.readers.registry import open_source
from kdfast.data.readers.relabel import replace_labels
from kdfast.data.source import compute_fingerprint, compute_normalization


@pytest.fixture(autouse=True)
def reads(tmp_path, monkeypatch):
    """Count the images that are decoded."""
    monkeypatch.setenv("KDFAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("kdfast.files.remembered._SETTLED_SECONDS", -1e9)
    decoded, decode = [], ImageSplit._decode
    monkeypatch.setattr(ImageSplit, "_decode", lambda self, file: decoded.append(file) or decode(self, file))
    return decoded


def facts(source):
    return source.fingerprint, compute_normalization(source.train), source.gray


@pytest.mark.parametrize("kind", ["folder", "classes", "list", "shards"])
@pytest.mark.filterwarnings("ignore:.*has no test split")
def test_a_second_opening_decodes_nothing(kind, write, tmp_path, reads):
    path, split = write[kind](tmp_path / kind), 0.25 if kind == "classes" else None
    first = facts(open_source(path, split=split))
    assert len(reads) >= len(open_source(path, split=split).train)
    del reads[:]
    assert facts(open_source(path, split=split)) == first
    assert not reads


def test_the_fingerprint_is_that_of_the_pixels(write, tmp_path):
    source = open_source(write["folder"](tmp_path / "a"))
    pixels = source.train.read(range(8))
    for image, file in zip(pixels, sorted((tmp_path / "a" / "train").rglob("*.png")), strict=True):
        Image.fromarray(image).save(file)  # other files, the same pixels
    again = open_source(tmp_path / "a")
    assert compute_fingerprint(again.train, 2) == source.fingerprint
    Image.fromarray(255 - pixels[3]).save(sorted((tmp_path / "a" / "train").rglob("*.png"))[3])
    changed = open_source(tmp_path / "a")
    assert changed.fingerprint != source.fingerprint
    expected = pixels.astype(np.float64)
    expected[3] = 255 - pixels[3]
    assert np.allclose(compute_normalization(changed.train).mean, expected.mean((0, 1, 2)) / 255)


def test_what_the_pixels_and_labels_depend_on_is_part_of_it(write, tmp_path):
    root = write["folder"](tmp_path / "a")
    source = open_source(root)
    turned = replace_labels(source, 1 - source.train.labels)
    sources = [source, open_source(root, size=8), open_source(root, size=16), turned]
    assert len({each.fingerprint for each in sources}) == 3  # the size of the images changes nothing
    assert len({each.fingerprint for each in [open_source(root), open_source(root, size=8)]}) == 2
