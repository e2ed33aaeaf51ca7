"""Arrays that are read back: nothing is believed of a header that its file does not bear out."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from kdfast.errors import DataError, SubsetError
from kdfast.files.arrays import read_npy, read_npz

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)
HEADERS = {
    "more rows": (b"(3, 4), }   ", b"(9999, 4), }"),
    "a huge array": (b"(3, 4), }                ", b"(3, 4000000000000000), } "),
    "a negative length": (b"(3, 4), } ", b"(-3, 4), }"),
    "objects": (b"'<f4'", b"'|O' "),
    "a wider dtype": (b"'<f4'", b"'<f8'"),
    "no dtype": (b"'<f4'", b"'xyz'"),
    "no dict": (b"{'descr'", b"['descr'"),
    "deep nesting": (b"(3, 4), }                                     ", b"(" * 46),
    "another version": (b"NUMPY\x01", b"NUMPY\x07"),
}


@pytest.mark.parametrize("mode", [None, "r", "c"])
@pytest.mark.parametrize("name", HEADERS)
def test_refuses_a_changed_header(tmp_path: Path, name: str, mode) -> None:
    np.save(tmp_path / "a.npy", ARRAY)
    raw, (old, new) = (tmp_path / "a.npy").read_bytes(), HEADERS[name]
    assert old in raw
    (tmp_path / "a.npy").write_bytes(raw.replace(old, new, 1))
    with pytest.raises(SubsetError, match=r"a\.npy is damaged or not a plain \.npy array .*: prune again$"):
        read_npy(tmp_path / "a.npy", mmap_mode=mode, error=SubsetError, advice="prune again")


@pytest.mark.parametrize("mode", [None, "r", "c"])
def test_reads_what_was_saved(tmp_path: Path, mode) -> None:
    for array in (ARRAY, np.asfortranarray(ARRAY), np.zeros((0, 3)), np.float64(3), np.array(["a", "bc"])):
        np.save(tmp_path / "a.npy", array)
        assert np.array_equal(read_npy(tmp_path / "a.npy", mmap_mode=mode), array)


@pytest.mark.parametrize(
    ("options", "message"), [({"shape": (3, 5)}, "shape"), ({"shape": (-1,)}, "shape"), ({"dtype": "f8"}, "float32")]
)
def test_names_what_does_not_fit(tmp_path: Path, options: dict, message: str) -> None:
    np.save(tmp_path / "a.npy", ARRAY)
    assert read_npy(tmp_path / "a.npy", shape=(-1, 4), dtype=np.float32).shape == (3, 4)
    with pytest.raises(DataError, match=rf"a\.npy .*{message}"):
        read_npy(tmp_path / "a.npy", **options)


@pytest.mark.parametrize("cut", [0, 5, 40, 130, -1])
def test_refuses_truncated_and_longer_files(tmp_path: Path, cut: int) -> None:
    np.save(tmp_path / "a.npy", ARRAY)
    raw = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(raw[:cut] if cut >= 0 else raw + b"x")
    with pytest.raises(DataError, match=r"a\.npy is damaged"):
        read_npy(tmp_path / "a.npy")


def odd_archive(path: Path, kind: str) -> None:
    np.savez(path, a=ARRAY, b=ARRAY)
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"PK\x01\x02")
    if kind == "encrypted":
        raw[entry + 8] |= 1
    elif kind == "a flipped bit":
        raw[200] ^= 4
    elif kind == "a declared size":
        raw[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    path.write_bytes(raw[: len(raw) // 2] if kind == "half" else raw)
    if kind == "lzma":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
            for name, content in members.items():
                archive.writestr(name, content)


@pytest.mark.parametrize("kind", ["encrypted", "a flipped bit", "a declared size", "half", "lzma"])
def test_refuses_odd_archives(tmp_path: Path, kind: str) -> None:
    odd_archive(tmp_path / "a.npz", kind)
    with pytest.raises(DataError, match=r"a\.npz is damaged or not an \.npz of plain arrays .*write it again"):
        read_npz(tmp_path / "a.npz")


def test_reads_the_named_arrays(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=ARRAY, b=np.zeros(1000), c=np.array([{}], object))
    assert read_npz(tmp_path / "a.npz", ["a", "b"]).keys() == {"a", "b"}
    with pytest.raises(DataError, match="lacks d; it holds a, b, c"):
        read_npz(tmp_path / "a.npz", ["d"])
    with pytest.raises(DataError, match="Python objects"):
        read_npz(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"b\.npy has 8128 bytes, more than 500"):
        read_npz(tmp_path / "a.npz", ["b"], member_bytes=500)
