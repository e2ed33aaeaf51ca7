"""Files of a cache that hold something else: CacheMismatch, which names the file and the field."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdfast.data.source import Source
from kdfast.errors import CacheMismatch
from kdfast.files import read_sealed, write_json, write_sealed
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache

FIELDS: dict[str, tuple[str, Any]] = {
    "per_shard": ("per_shard", 0),
    "dtype": ("dtype", "complex64"),
    "precision": ("precision", "FLOAT32"),
    "samples": ("coverage.samples", -4),
    "whole": ("coverage.whole", "yes"),
    "views": ("views.n_views", 2.5),
    "std": ("teacher.std", [0.0, 1.0, 1.0]),
    "top-1": ("train_top1", 1e300),
    "files": ("files", []),
    "class count": ("data.classes", 10**30),
}


@pytest.fixture(scope="module")
def built(source: Source, teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    build_cache(source, teacher, path, n_views=2, ids=np.arange(0, 20, 2))
    return path


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "cache")


@pytest.mark.parametrize("name", FIELDS)
def test_names_the_field_of_a_sealed_manifest(cache: Path, name: str) -> None:
    field, value = FIELDS[name]
    manifest = read_sealed(cache / "manifest.json")
    *outer, last = field.split(".")
    inner = manifest[outer[0]] if outer else manifest
    inner[last] = value
    write_sealed(cache / "manifest.json", manifest)
    message = r"manifest\.json.*digest" if value == 10**30 else rf"manifest\.json: field {field}"
    with pytest.raises(CacheMismatch, match=message):
        TeacherCache.open(cache)


@pytest.mark.parametrize("fields", [{}, {"seconds": "1"}, {"seconds": -1.0}])
def test_names_the_field_of_sealed_timing(cache: Path, fields: dict) -> None:
    write_sealed(cache / "timing.json", fields)
    with pytest.raises(CacheMismatch, match=r"timing\.json.*seconds"):
        TeacherCache.open(cache)


def test_refuses_deep_nesting_and_unsealed_values(cache: Path) -> None:
    for text in ("[" * 100_000, json.dumps({"a": json.loads("[" * 90 + "]" * 90)}), "7", '{"x": NaN}'):
        (cache / "manifest.json").write_text(text)
        with pytest.raises(CacheMismatch, match=r"manifest\.json is damaged"):
            TeacherCache.open(cache)
    write_json(cache / "manifest.json", {"format": "kdfast-cache"})
    with pytest.raises(CacheMismatch, match=r"manifest\.json is damaged"):
        TeacherCache.open(cache)


ARRAYS = {
    "objects": np.array([{}], dtype=object),
    "other shape": np.zeros((3, 3), np.float32),
    "other dtype": np.zeros((10, 3), np.int8),
    "strings": np.array(["a", "b"]),
}


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("features.npy", lambda c: c.features()),
        ("identity_logits.npy", lambda c: c.identity_logits()),
        ("logits-00000.npy", lambda c: c.lookup(c.coverage[:2], np.zeros(2, np.int64))),
    ],
)
def test_refuses_another_array_in_place_of_a_file(cache: Path, array: str, file: str, read) -> None:
    np.save(cache / file, ARRAYS[array], allow_pickle=True)
    with pytest.raises(CacheMismatch, match=file.replace(".", r"\.")):
        read(TeacherCache.open(cache, check_files=False))
