"""A folder of .beton files opens only if it holds what was written: both splits, and the record itself."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from kdfast.data.ffcv import record as module
from kdfast.data.ffcv.record import CHECKED, RECORD, UNSEALED, file_marks, write_record
from kdfast.data.ffcv.write import write_beton
from kdfast.data.readers.registry import open_source
from kdfast.data.source import ArraySplit, compute_fingerprint, default_view_spec
from kdfast.errors import DataError
from kdfast.files import read_sealed, sha256_file

pytest.importorskip("ffcv")

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
# Other values of the record's fields, each of which would be accepted by itself.
FIELDS = {
    "classes": ["ant", "bee", "cow"],
    "views": {**default_view_spec((8, 8, 3), flip=True).to_dict(), "pad": 2},
    "fingerprint": "f" * 64,
    "origin": "f" * 64,
    "jpeg_quality": 90,
}


@pytest.fixture(scope="module")
def split() -> ArraySplit:
    return ArraySplit(IMAGES, np.arange(30) % 3, "split")


@pytest.fixture(scope="module")
def written(split: ArraySplit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `convert` writes, without reading it back, for which FFCV compiles for seconds."""
    folder = tmp_path_factory.mktemp("betons")
    for name in ("train.beton", "test.beton"):
        write_beton(split, folder / name)
    found = compute_fingerprint(split, 3)
    fields = {"classes": ["ant", "bee", "cat"], "views": default_view_spec(split.shape, flip=True).to_dict()}
    digests = {name: sha256_file(folder / name) for name in ("train.beton", "test.beton")}
    write_record(folder, {**fields, "jpeg_quality": None, "origin": found, "fingerprint": found}, digests)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "betons")


def zero(file: Path, *, keep_times: bool) -> None:
    """Overwrite pixels, in place."""
    times, (first, *_) = file.stat(), IMAGES
    at = file.read_bytes().index(first.tobytes())
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(bytes(600))
    if keep_times:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True])
@pytest.mark.parametrize("name", ["train.beton", "test.beton"])
def test_a_damaged_split_is_refused(folder: Path, name: str, keep_times: bool) -> None:
    assert open_source(folder).fingerprint
    time.sleep(0.2)
    assert open_source(folder).fingerprint  # now the content of both files is known
    zero(folder / name, keep_times=keep_times)
    with pytest.raises(DataError, match=f"{name} does not hold what was written"):
        open_source(folder)


@pytest.mark.parametrize("name", ["train.beton", "test.beton"])
def test_a_split_damaged_while_it_was_copied_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    time.sleep(0.2)
    open_source(folder)
    zero(shutil.copytree(folder, tmp_path / "copy") / name, keep_times=True)
    with pytest.raises(DataError, match=name):
        open_source(tmp_path / "copy")


@pytest.mark.parametrize("field", FIELDS)
def test_an_edited_record_is_refused(folder: Path, field: str) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, field: FIELDS[field]}, indent=1) + "\n")
    with pytest.raises(DataError, match=r"data\.json is damaged or was edited"):
        open_source(folder)


def test_unchanged_files_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(module, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    time.sleep(0.2)
    for _ in range(3):
        open_source(folder)
    assert sorted(read) == ["test.beton", "train.beton"]
    (folder / "test.beton").touch()
    open_source(folder)
    assert read[2:] == ["test.beton"]
    (folder / CHECKED).write_text("{}")  # damaged: as if nothing was known
    open_source(folder)
    assert len(read) == 5


def as_version_1(folder: Path) -> None:
    record = {k: v for k, v in read_sealed(folder / RECORD).items() if k != "format"}
    (folder / RECORD).write_text(json.dumps({"format": UNSEALED, **record, "files": file_marks(folder)}))


def test_a_folder_of_version_1_is_verified_once_and_sealed(folder: Path, split: ArraySplit) -> None:
    as_version_1(folder)
    source = open_source(folder)
    assert (source.classes, source.fingerprint) == (("ant", "bee", "cat"), compute_fingerprint(split, 3))
    assert read_sealed(folder / RECORD)["files"]["test.beton"]["sha256"] == sha256_file(folder / "test.beton")
    zero(folder / "test.beton", keep_times=True)
    with pytest.raises(DataError, match=r"test\.beton"):
        open_source(folder)


def test_a_damaged_folder_of_version_1_is_refused_or_named(folder: Path) -> None:
    as_version_1(folder)
    (folder / "test.beton").touch()
    with pytest.warns(UserWarning, match=r"test\.beton was changed or copied since .* convert the data again"):
        open_source(folder)
    as_version_1(folder)
    zero(folder / "train.beton", keep_times=True)
    with pytest.raises(DataError, match=r"train\.beton does not hold the training samples"):
        open_source(folder)
