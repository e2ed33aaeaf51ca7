import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kdfast.data.ffcv import write as module
from kdfast.data.ffcv.record import CHECKED
from kdfast.data.ffcv.write import convert
from kdfast.data.readers.registry import open_source
from kdfast.data.source import ArraySplit, Source, compute_fingerprint, default_view_spec
from kdfast.errors import DataError, DataWarning, OutputError, UsageError

pytest.importorskip("ffcv")


class Wrapped:
    """A split with another read function."""

    def __init__(self, data, read):
        self.labels, self.shape, self.read = data.labels, data.shape, read

    def __len__(self):
        return len(self.labels)


@pytest.fixture(scope="module")
def source(split):
    train, test = split(60), split(9, seed=1)
    return Source("memory", "npz", ("ant", "bee", "cat"), train, test, default_view_spec(train.shape, flip=True))


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert(source, folder)
    return folder


@pytest.fixture
def betons(converted, tmp_path):
    """Make the test's folder a copy of the converted source."""
    return shutil.copytree(converted, tmp_path, dirs_exist_ok=True)


def same(one, two):
    return np.array_equal(one.read(range(len(one))), two.read(range(len(two)))) and np.array_equal(
        one.labels, two.labels
    )


def files(folder):
    hidden = (".kdfast.lock", CHECKED)
    return sorted(path.name for path in folder.iterdir() if path.name not in hidden)


@pytest.mark.parametrize(
    "kind", ["digits", "folder", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("cifar10", "svhn", "npz"))]
)
def test_conversion_keeps_the_fingerprint(make_source, tmp_path, kind):
    origin = open_source(make_source(kind))
    convert(origin, tmp_path / "out")
    result = open_source(tmp_path / "out")
    assert (result.kind, result.classes, result.view_spec) == ("beton", origin.classes, origin.view_spec)
    assert result.fingerprint == origin.fingerprint == compute_fingerprint(result.train, len(result.classes))
    assert same(result.train, origin.train)
    assert same(result.test, origin.test)
    assert files(tmp_path / "out") == ["data.json", "test.beton", "train.beton"]


def test_blocks_keep_the_order(source, tmp_path, monkeypatch):
    monkeypatch.setattr("kdfast.data.source._BLOCK_BYTES", 7 * 8 * 8 * 3)
    assert same(convert(source, tmp_path).train, source.train)


def test_images_larger_than_a_page(split, tmp_path):
    big = split(2, side=1800, classes=1)
    result = convert(Source("memory", "npz", ("a",), big, big, default_view_spec(big.shape, flip=False)), tmp_path)
    assert same(result.train, big)


def test_every_image_is_counted_twice(source, tmp_path):
    seen = []
    convert(source, tmp_path, progress=lambda *step: seen.append(step))
    images = len(source.train) + len(source.test)
    assert seen[-1][:2] == (2 * images, 2 * images)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {note for _, _, note in seen} == {"writing", "reading back"}


def test_complete_conversion_is_not_repeated(source, betons):
    before = {name: (betons / name).stat().st_mtime_ns for name in files(betons)}
    convert(source, betons)
    assert {name: (betons / name).stat().st_mtime_ns for name in files(betons)} == before


def test_detects_pixels_changed_after_the_conversion(betons):
    reader = open_source(betons).train
    first = reader.read([0]).tobytes()
    file = betons / "train.beton"
    raw = bytearray(file.read_bytes())
    raw[raw.index(first) + 5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match="it is damaged or was changed; convert the data again"):
        _ = open_source(betons).fingerprint


def test_converts_a_changed_file_again(source, split, betons):
    module.write_beton(split(60, seed=5), betons / "train.beton")
    assert same(convert(source, betons).train, source.train)


def test_opens_betons_without_a_record(source, betons):
    (betons / "data.json").unlink()
    with pytest.warns(DataWarning, match=r"has no data\.json: its files are not verified"):
        result = open_source(betons)
    assert result.classes == ("0", "1", "2")
    assert result.fingerprint == source.fingerprint


def test_rejects_a_damaged_record(betons):
    for text in ("{", "[]", '{"format": "kdfast betons 1"}'):
        (betons / "data.json").write_text(text)
        with pytest.raises(DataError, match=r"data\.json"):
            open_source(betons)


@pytest.mark.parametrize("name", ["train.beton", "test.beton"])
def test_rejects_a_missing_beton(betons, name):
    (betons / name).unlink()
    with pytest.raises(DataError, match=f"lacks {name}"):
        open_source(betons)


def test_does_not_overwrite_other_data(source, split, tmp_path):
    convert(source, tmp_path / "a")
    other = Source("memory", "npz", source.classes, split(60, seed=7), source.test, source.view_spec)
    with pytest.raises(OutputError, match="holds another data set"):
        convert(other, tmp_path / "a")
    (tmp_path / "a" / "data.json").unlink()
    with pytest.raises(OutputError, match="did not write"):
        convert(source, tmp_path / "a")


def contents(root):
    # Opening a source that is slow to check leaves a note of it.
    paths = (path for path in root.rglob("*") if path.name != CHECKED)
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize(
    "names",
    [
        ["data.json"],
        ["notes.txt"],
        ["manifest.json", "logits-00000.npy"],
        [".building/plan.json"],
        ["config.json", "checkpoints/latest.json"],
        ["train/ant/0.png"],
        ["data.json", "train.beton"],
    ],
)
def test_rejects_a_folder_with_other_files_and_does_not_change_it(source, tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"mine": 1}')
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="use another folder") as caught:
        convert(source, tmp_path)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_ignores_hidden_files_of_other_programs(source, tmp_path):
    (tmp_path / ".directory").write_text("")
    assert same(convert(source, tmp_path).train, source.train)
    (tmp_path / "notes.txt").write_text("mine")
    assert same(convert(source, tmp_path).train, source.train)


@pytest.mark.parametrize("out", [".", "train", "train/ant", "train/wasp", "test/wasp/deep"])
def test_rejects_a_folder_among_the_images_and_does_not_change_it(image_folder, tmp_path, out):
    root = image_folder(tmp_path / "images")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="use another folder"):
        convert(open_source(root), root / out)
    assert contents(tmp_path) == before
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(OutputError, match="use another folder"):
        convert(open_source(root), tmp_path / "link" / out)


def test_converts_to_a_new_folder_among_the_images(image_folder, tmp_path):
    root = image_folder(tmp_path / "images")
    assert same(convert(open_source(root), root / "betons").train, open_source(root).train)


def test_rejects_the_source_as_output(betons):
    before = contents(betons)
    with pytest.raises(OutputError, match="is the source itself"):
        convert(open_source(betons), betons)
    assert contents(betons) == before


@pytest.mark.parametrize("text", ['{"format": "kdfast betons 9"}', '{"format": "kdfast betons 1", '])
def test_rejects_a_damaged_record_without_betons(source, tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=r"data\.json"):
        open_source(tmp_path)
    with pytest.raises(OutputError, match=r"data\.json"):
        convert(source, tmp_path)
    assert files(tmp_path) == ["data.json"]


def test_exception_while_reading_is_raised_and_leaves_no_beton(source, tmp_path):
    def fail(ids):
        raise DataError("image 7 is damaged")

    broken = Source("memory", "npz", source.classes, Wrapped(source.train, fail), source.test, source.view_spec)
    with pytest.raises(DataError, match="image 7"):
        convert(broken, tmp_path)
    assert files(tmp_path) == ["data.json"]
    with pytest.raises(DataError, match="was interrupted"):
        open_source(tmp_path)
    assert same(convert(source, tmp_path).train, source.train)


@pytest.mark.parametrize("quality", [None, 90])
def test_rejects_a_file_that_reads_back_differently(source, tmp_path, monkeypatch, quality):
    original = module.write_beton

    def wrong(split, path, **options):
        images = split.images.copy()
        images[3, 0, 0, 0] ^= 255
        images[4] = 255 - (images[4] > 255)
        original(ArraySplit(images, split.labels, "x"), path, **options | {"on_block": None})
        options["on_block"](split.images)

    monkeypatch.setattr(module, "write_beton", wrong)
    with pytest.raises(DataError, match="does not read back"):
        convert(source, tmp_path, jpeg_quality=quality)
    assert files(tmp_path) == ["data.json"]


def test_rejects_wrong_labels(source, tmp_path, monkeypatch):
    original = module.write_beton
    monkeypatch.setattr(
        module,
        "write_beton",
        lambda split, path, **options: original(ArraySplit(split.images, split.labels[::-1], "x"), path, **options),
    )
    for quality in (None, 90):
        with pytest.raises(DataError, match="does not read back"):
            convert(source, tmp_path, jpeg_quality=quality)


def test_full_disk_is_reported(source, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_beton", full)
    with pytest.raises(OutputError, match="No space left"):
        convert(source, tmp_path)


def test_resumes_after_an_interrupt_before_the_record(source, tmp_path, monkeypatch):
    original = module.write_record

    def stop(path, record, digests):
        if digests:
            raise KeyboardInterrupt
        return original(path, record, digests)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_record", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path)
    assert files(tmp_path) == ["data.json", "test.beton", "train.beton"]
    with pytest.raises(DataError, match="was interrupted"):
        open_source(tmp_path)
    assert convert(source, tmp_path).fingerprint == source.fingerprint


KILLED = """
import sys, time
from kdfast.data.ffcv.record import CHECKED
from kdfast.data.ffcv.write import convert
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source

class Slow:
    def __init__(self, data):
        self.data, self.labels, self.shape = data, data.labels, data.shape
    def __len__(self):
        return len(self.data)
    def read(self, ids):
        print("reading", flush=True)
        time.sleep(120)

origin = open_source("digits")
slow = Source("digits", "digits", origin.classes, Slow(origin.train), origin.test, origin.view_spec)
convert(slow, sys.argv[1])
"""


def test_resumes_after_a_kill(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "train.beton").exists()
    assert not (tmp_path / "test.beton").exists()
    with pytest.raises(DataError, match="was interrupted"):
        open_source(tmp_path)
    origin = open_source("digits")
    assert convert(origin, tmp_path).fingerprint == origin.fingerprint
    assert [name for name in files(tmp_path) if name.startswith(".")] == []


def test_rejects_a_folder_in_use(source, tmp_path):
    from kdfast.files import FolderLock

    with FolderLock(tmp_path), pytest.raises(OutputError, match="in use"):
        convert(source, tmp_path)


def smooth(count, side, seed):
    """Return color ramps, which JPEG preserves well."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (count, 2, 3)).astype(float)
    ramp = np.linspace(0, 1, side)[None, :, None, None]
    rows = corners[:, None, None, 0] * (1 - ramp) + corners[:, None, None, 1] * ramp
    return ArraySplit(np.broadcast_to(rows, (count, side, side, 3)).astype(np.uint8), np.arange(count) % 3, "ramps")


def test_jpeg_conversion(tmp_path):
    train, test = smooth(20, 64, 0), smooth(6, 64, 1)
    origin = Source("memory", "npz", ("a", "b", "c"), train, test, default_view_spec(train.shape, flip=True))
    result = convert(origin, tmp_path, jpeg_quality=95)
    close = result.train.read(range(20)).astype(int) - train.images
    assert np.abs(close).mean() < 3
    assert result.fingerprint == compute_fingerprint(result.train, 3) != origin.fingerprint
    assert convert(origin, tmp_path, jpeg_quality=95).fingerprint == result.fingerprint
    with pytest.raises(OutputError, match="another encoding"):
        convert(origin, tmp_path)


@pytest.mark.parametrize("quality", [0, 49, 101])
def test_rejects_a_jpeg_quality_out_of_range(source, tmp_path, quality):
    with pytest.raises(UsageError, match="50 to 100"):
        convert(source, tmp_path, jpeg_quality=quality)


def test_writing_leaves_no_shared_memory(source, tmp_path):
    before = set(os.listdir("/dev/shm"))
    convert(source, tmp_path)
    deadline = time.monotonic() + 5
    while set(os.listdir("/dev/shm")) - before and time.monotonic() < deadline:
        time.sleep(0.1)  # other tests may run at the same time
    assert not set(os.listdir("/dev/shm")) - before
