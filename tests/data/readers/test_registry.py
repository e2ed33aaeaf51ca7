import os
import subprocess
import sys

import numpy as np
import pytest

from kdfast.data.readers.registry import SOURCES, open_source
from kdfast.errors import DataError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*has no test split")
RULE = {"classes": 0.25}  # `split` of the kinds that always need one
RESIZED = ("folder", "classes", "list", "shards", "table")


@pytest.mark.parametrize("kind", SOURCES)
def test_recognizes_every_kind(make_source, kind):
    source = open_source(make_source(kind), split=RULE.get(kind))
    assert source.kind == kind
    for split in (source.train, source.test):
        assert split.labels.dtype == np.int64
        assert split.labels.shape == (len(split),)
        pixels = split.read([len(split) - 1, 0])
        assert pixels.dtype == np.uint8
        assert pixels.shape == (2, *split.shape)
        assert np.array_equal(pixels[1], split.read([0])[0])
        assert split.labels.max() < len(source.classes)
    assert source.view_spec.size == source.train.shape[:2]
    assert len(source.fingerprint) == 64


@pytest.mark.parametrize("kind", SOURCES)
def test_accepts_the_size_of_the_images(make_source, kind):
    path = make_source(kind)
    size = open_source(path, split=RULE.get(kind)).train.shape[0]
    assert open_source(path, size=size, split=RULE.get(kind)).train.shape == (size, size, 3)


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind not in RESIZED])
def test_rejects_another_size_except_for_folders(make_source, kind):
    with pytest.raises(UsageError, match="only image folders can be resized"):
        open_source(make_source(kind), size=77)


def test_rejects_a_size_below_one():
    with pytest.raises(UsageError, match="pass 1 to 65535"):
        open_source("digits", size=0)


def test_rejects_unknown_paths(tmp_path):
    with pytest.raises(DataError, match="nothing at"):
        open_source(tmp_path / "absent")
    with pytest.raises(DataError, match=r"\(nothing\) is not a known data source"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"\(notes\.txt\) is not a known data source"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="one file"):
        open_source(tmp_path / "notes.txt")
    for name in "fedcb":
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"\(b, c, d, e, f and 1 more\)"):
        open_source(tmp_path)


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    for name in ("listdir", "scandir"):

        def refuse(path="."):
            raise PermissionError(13, "Permission denied", str(path))

        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(DataError, match=r"cannot list .*: Permission denied"):
                open_source(tmp_path)


def test_foreign_data_json_is_not_a_conversion(tmp_path, image_folder):
    root = image_folder(tmp_path)
    (root / "data.json").write_text('{"author": "x"}')
    assert open_source(root).kind == "folder"


def test_import_does_not_import_ffcv_or_change_torch_threads():
    code = (
        "import sys, torch; n = torch.get_num_threads();"
        "import kdfast.data.readers.registry, kdfast.data.loaders;"
        "assert 'ffcv' not in sys.modules; assert torch.get_num_threads() == n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
