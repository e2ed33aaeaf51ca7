"""Decoders of JPEG files: only those with Pillow's pixels are used, and only where they can."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.folders import jpeg
from kdfast.data.readers.folders.image_file import decode_rgb, decoder, opened_image
from kdfast.errors import DataError


@pytest.fixture
def use(monkeypatch):
    """Register decoders alone; forget what was found before and after."""

    def register(**decoders):
        monkeypatch.setattr(jpeg, "DECODERS", {name: lambda f=f: f for name, f in decoders.items()})
        monkeypatch.setattr(jpeg, "version", lambda package: "1.2")
        jpeg.fast_decoder.cache_clear()

    yield register
    monkeypatch.undo()
    jpeg.fast_decoder.cache_clear()


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def saved(path, mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return str(path)


def decoded(path):
    with opened_image(path) as image:
        return np.asarray(decode_rgb(image))


def test_a_decoder_with_other_pixels_or_one_that_fails_is_not_used(use):
    use(off=lambda data: by_pillow(data) ^ 1, broken=lambda data: 1 / 0)
    assert jpeg.fast_decoder() is None
    assert "off" not in decoder()
    use(off=lambda data: by_pillow(data) ^ 1, same=by_pillow)
    assert jpeg.fast_decoder().name == "same 1.2"
    assert decoder().endswith(", same 1.2")


@pytest.mark.parametrize("name", jpeg.DECODERS)
def test_an_installed_decoder_gives_the_pixels_of_pillow(name, tmp_path):
    pytest.importorskip(name)
    decode = jpeg.DECODERS[name]()
    for mode in ("RGB", "L"):
        data = Path(saved(tmp_path / "a.jpg", mode, quality=90)).read_bytes()
        assert np.array_equal(decode(data), by_pillow(data))


def test_only_jpeg_files_in_color_or_gray_go_to_the_decoder(use, tmp_path):
    seen = []
    use(same=lambda data: (seen.append(len(data)), by_pillow(data))[1])
    jpeg.fast_decoder()
    seen.clear()
    for name, mode in (("a.png", "RGB"), ("b.jpg", "CMYK"), ("c.gif", "P")):
        file = saved(tmp_path / name, mode)
        assert np.array_equal(decoded(file), by_pillow(Path(file).read_bytes()))
    assert not seen
    for name, mode in (("d.jpg", "RGB"), ("e.jpg", "L")):
        file = saved(tmp_path / name, mode)
        assert np.array_equal(decoded(file), by_pillow(Path(file).read_bytes()))
    assert len(seen) == 2


def test_what_the_decoder_refuses_is_left_to_pillow(use, tmp_path):
    calls = []

    def fails_later(data):
        calls.append(0)
        if len(calls) > len(jpeg._probes()):
            raise ValueError("no")
        return by_pillow(data)

    use(same=fails_later)
    file = saved(tmp_path / "a.jpg")
    assert np.array_equal(decoded(file), by_pillow(Path(file).read_bytes()))
    assert len(calls) == len(jpeg._probes()) + 1
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"{file} cannot be read as an image"):
        decoded(file)


def test_probes_have_every_subsampling():
    found = set()
    for data, pixels in jpeg._probes():
        with Image.open(io.BytesIO(data)) as image:
            layers = image.layer  # of each channel: its number, and its blocks across and down
            found.add((layers[0][1:3], bool(image.info.get("progressive"))))
            assert pixels.shape == (image.height, image.width, 3)
    assert found == {(blocks, kind) for blocks in ((1, 1), (2, 1), (1, 2), (2, 2)) for kind in (False, True)}
