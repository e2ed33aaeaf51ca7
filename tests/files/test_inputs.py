"""What others wrote is opened only if it is a regular file of bounded size, and never waited for."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kdfast.errors import DataError
from kdfast.files import inputs, read_json, sha256_file
from kdfast.files.arrays import read_npy, read_npz


def not_files(folder: Path) -> dict[str, Path]:
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    return {
        "pipe": folder / "pipe",
        "link to a device": folder / "link",
        "device": Path("/dev/full"),
        "folder": folder,
    }


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "device", "folder"])
@pytest.mark.parametrize("read", [read_npy, read_npz, read_json, sha256_file])
def test_refuses_what_is_no_file_without_waiting(tmp_path, kind, read):
    with pytest.raises(DataError, match=r"cannot read .*(not a regular file|directory)"):
        read(not_files(tmp_path)[kind])


def test_refuses_a_file_above_its_limit_before_it_is_read(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(OSError, match=r"has 1099511627776 bytes, the limit is 268435456"):
        inputs.read_bounded(path, inputs.MAX_JSON_BYTES)
    with pytest.raises(DataError, match="the limit is"):
        read_json(path)
    path.write_bytes(b"abc")
    assert inputs.read_bounded(path, 3) == b"abc"


def declared(count: int) -> bytes:
    """Return the header of an .npy file of `count` bytes."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count},), }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("count", "held", "message"),
    [
        (10**12, 3, "but 3 bytes follow"),
        (10**30, 3, "but 3 bytes follow"),
        (50_000_000, 50_000_000, "takes 0.1 GB, and 0.0 GB of memory are free"),
    ],
)
def test_refuses_arrays_that_do_not_fit_before_they_are_read(tmp_path, monkeypatch, count, held, message):
    monkeypatch.setattr("kdfast.files.arrays.available_memory", lambda: 10_000_000)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", declared(count) + bytes(held))
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    with pytest.raises(DataError, match=message):
        read_npz(tmp_path / "a.npz")
    (tmp_path / "a.npy").write_bytes(declared(count) + bytes(held))
    with pytest.raises(DataError, match=message):
        read_npy(tmp_path / "a.npy")


def test_a_mapped_array_may_be_larger_than_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("kdfast.files.arrays.available_memory", lambda: 10)
    np.save(tmp_path / "a.npy", np.arange(100))
    assert read_npy(tmp_path / "a.npy", mmap_mode="r").sum() == 4950


def test_available_memory_is_at_most_the_total(monkeypatch, tmp_path):
    psutil = pytest.importorskip("psutil")
    assert 0 < inputs.available_memory() <= inputs.total_memory() <= psutil.virtual_memory().total
    for text in ("", "MemAvailable:\n", "MemAvailable: many kB\n"):
        (tmp_path / "meminfo").write_text(text)
        monkeypatch.setattr(inputs, "_MEMORY_INFO", str(tmp_path / "meminfo"))
        assert inputs.available_memory() == inputs.total_memory()
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       7 kB\n")
    assert inputs.available_memory() == 7 * 1024
