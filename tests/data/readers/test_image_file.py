import os
import threading

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.folders import image_file
from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(x) run\nshowpage\n%%EOF\n"


def fails(root, message):
    with pytest.raises(DataError, match=message):
        open_source(root).train.read(range(8))


def test_postscript_behind_another_name_is_not_run(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("Ghostscript runs"))
    root = image_folder(tmp_path)
    (root / "train/ant/0.png").write_bytes(EPS)
    fails(root, r"0\.png cannot be read as an image \(it is not JPEG, PNG,")


@pytest.mark.parametrize("form", ["PCX", "SGI", "ICO", "DDS", "TGA", "PDF", "JPEG2000"])
def test_other_formats_are_not_read(tmp_path, image_folder, form):
    root = image_folder(tmp_path)
    Image.new("RGB", (16, 16)).save(root / "train/ant/0.png", format=form)
    fails(root, r"0\.png cannot be read as an image \(it is not JPEG")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO"])
def test_common_formats_are_read_behind_any_name(tmp_path, image_folder, form):
    root = image_folder(tmp_path)
    Image.new("RGB", (16, 16), (255, 255, 255)).save(root / "train/ant/0.png", format=form)
    assert open_source(root).train.read([0]).min() >= 250


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder"])
def test_refuses_what_is_no_file_without_waiting(tmp_path, image_folder, kind):
    root = image_folder(tmp_path)
    file = root / "train/ant/0.png"
    source = open_source(root)
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "/dev/full")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image \((it is not a regular file|Is a dir)"):
        source.train.read([0])
    if kind != "folder":
        fails(root, r"0\.png cannot be read as an image \(it is not a regular file")


@pytest.mark.parametrize("limit", [200, 100])  # Pillow warns above its limit and raises above twice the limit
def test_too_many_pixels_are_refused_before_decoding(tmp_path, image_folder, monkeypatch, limit):
    root = image_folder(tmp_path)
    monkeypatch.setattr(image_file, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    fails(root, rf"0\.png .*its 16 x 16 pixels exceed the limit of {limit}")


def test_the_limit_holds_where_pillow_has_none(tmp_path, monkeypatch):
    Image.new("L", (10_000, 9_000)).save(tmp_path / "bomb.png")  # 90 million pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with (
        pytest.raises(DataError, match=r"its 10000 x 9000 pixels exceed the limit of 89478485"),
        image_file.opened_image(str(tmp_path / "bomb.png")),
    ):
        pass


def test_a_file_above_the_limit_is_not_read(tmp_path, image_folder):
    root = image_folder(tmp_path)
    with open(root / "train/ant/0.png", "r+b") as file:
        file.truncate(image_file.MAX_IMAGE_BYTES + 1)
    fails(root, r"0\.png cannot be read as an image \(it has 1073741825 bytes, the limit is 1073741824\)")


def test_threads_report_bombs_too(tmp_path, image_folder, monkeypatch):
    root = image_folder(tmp_path, per_class=10)
    source = open_source(root)
    monkeypatch.setattr(image_file, "MAX_IMAGE_PIXELS", 255)
    with pytest.raises(DataError, match="exceed the limit of 255"):
        source.train.read(np.arange(20))
    assert threading.active_count() < 20
