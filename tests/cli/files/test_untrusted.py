"""Files that someone else prepared: pipes, devices, bombs and deep nesting are refused at once, with the exit code."""

import gzip
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.archives import cifar as cifar_reader

SECONDS = 20  # commands take one; some hung, or read until the memory was full


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def device(path: Path) -> Path:
    path.symlink_to("/dev/full")
    return path


def expect(outcome, code: int, pattern: str) -> None:
    assert outcome.code == code, outcome.err
    assert re.search(pattern, outcome.err), outcome.err
    assert outcome.err.count("\n") == 1
    assert len(outcome.err) < 2000
    assert "unforeseen" not in outcome.err


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", ["--subset", "--config", "--scores"])
def test_options_refuse_pipes_and_devices(kdfast, tiny: Path, tmp_path: Path, make, name: str) -> None:
    file = make(tmp_path / "input")
    command = ("distill", "--student", "resnet8", "--alpha", 0) if name == "--subset" else ("prune", "--fraction", 0.5)
    outcome = kdfast(*command, "--data", tiny, "--out", tmp_path / "out.npy", name, file)
    expect(outcome, 2 if name == "--config" else 3, "not a regular file|not a score file|cannot read")
    assert not (tmp_path / "out.npy").exists()


FOLDERS = ("train_32x32.mat", "data_batch_1", "data.json")


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", ["a.npz", "a.tar.gz", "a.tar", *FOLDERS])
def test_data_refuses_pipes_and_devices(kdfast, tmp_path: Path, make, name: str) -> None:
    path = make(tmp_path / name)
    expect(kdfast("data", "info", tmp_path if name in FOLDERS else path), 3, "kdfast: ")


@pytest.mark.parametrize("make", [pipe, device])
def test_images_refuse_pipes_and_devices(kdfast, tmp_path: Path, make) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "a" / "0.png")
    make(tmp_path / "train" / "a" / "1.png")
    expect(kdfast("data", "info", tmp_path), 3, r"1\.png cannot be read as an image \(it is not a regular file\)")


def test_pixels_beyond_the_limit_give_one_line(tmp_path: Path) -> None:
    """In a process of its own, as pytest collects warnings; only the header of the image is large."""
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    (tmp_path / "train" / "a" / "1.pgm").write_bytes(b"P5 10000 10000 255\n")
    ran = subprocess.run([sys.executable, "-m", "kdfast", "data", "info", tmp_path], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (3, "", 1), ran.stderr
    assert "1.pgm cannot be read as an image (its 10000 x 10000 pixels exceed the limit" in ran.stderr


ALIASES = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in itertools.pairwise("abcdefghi"))

CONFIGS = {
    "alias bomb": (ALIASES, "has the anchor or alias a: write the value out"),
    "anchor": ("out: &name x\n", "has the anchor or alias name"),
    "merge": ("<<: *x\n", "has the anchor or alias x"),
    "deep flow": ("out: " + "[" * 30_000, "nested too deeply"),
    "deep blocks": ("- " * 2000 + "x", "nested too deeply"),
    "large": ("# " + "x" * (64 << 10), "has 65538 bytes, the limit is 65536"),
    "long value": (f"seed: [{'1, ' * 900}]", r"seed is \[1, 1, .*\.\.\."),
    "long key": (f"{'k' * 900}: 1", "no option 'kkk"),
    "long number": (f"seed: {'9' * 5000}", "cannot be read: Exceeds the limit|seed"),
    "impossible date": ("seed: 2001-99-99", "cannot be read: month must be"),
    "code": ("seed: !!python/object/apply:os.getpid []", "cannot be read: could not determine a constructor"),
    "binary": ("\0", "cannot be read"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_are_limited(kdfast, tiny: Path, tmp_path: Path, name: str) -> None:
    text, message = CONFIGS[name]
    (tmp_path / "c.yaml").write_text(text)
    outcome = kdfast("distill", "--data", tiny, "--out", tmp_path / "run", "--config", tmp_path / "c.yaml")
    expect(outcome, 2, message)


def npy(count: int) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 8, 8, 3)}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize("count", [10**12, 10**6, 10**25])
def test_npz_bombs_are_refused_by_their_headers(kdfast, tmp_path: Path, monkeypatch, count: int) -> None:
    monkeypatch.setattr("kdfast.files.arrays.available_memory", lambda: 10**8)
    labels = io.BytesIO()
    np.save(labels, np.zeros(3, np.int64))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("train_images.npy", "w") as file:
            file.write(npy(count))
            for _ in range(192 if count == 10**6 else 1):
                file.write(bytes(10**6))
        for name in ("train_labels", "test_images", "test_labels"):
            archive.writestr(f"{name}.npy", labels.getvalue())
    assert (tmp_path / "a.npz").stat().st_size < 2_000_000
    expect(kdfast("data", "info", tmp_path / "a.npz"), 3, "of memory are free|bytes follow")


@pytest.mark.parametrize("member", ["other", "cifar-10-batches-py/data_batch_1", "pax"])
def test_tar_bombs_end_early(kdfast, tmp_path: Path, monkeypatch, member: str) -> None:
    monkeypatch.setattr(cifar_reader, "MAX_CIFAR_BYTES", 1 << 20)
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("cifar-10-batches-py/batches.meta", member):
            info = tarfile.TarInfo(name)
            info.size = 20 << 20 if name == member else 0
            info.type = tarfile.XHDTYPE if name == "pax" else tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    expect(kdfast("data", "info", tmp_path / "a.tar.gz"), 3, "has more than 1048576 bytes uncompressed")


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_large_members_of_a_folder_are_not_read(kdfast, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for other in cifar_reader.CIFAR10.files:
        (folder / other).touch()
    with open(folder / name, "wb") as file:
        file.truncate(1 << 40)
    expect(kdfast("data", "info", folder), 3, f"cannot read .*{name}: it has 1099511627776 bytes, the limit is")
