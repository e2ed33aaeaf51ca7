"""Pickles and files of torch.save give the arrays that pickle and torch give, and run nothing."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import pytest
import torch

from kdfast.errors import DataError
from kdfast.files.pickles import read_pickle

TENSORS = {
    "float32": torch.arange(5.0)[1:],
    "transposed": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).t(),
    "half": torch.arange(4).half(),
    "bfloat16": torch.arange(4).bfloat16(),
    "int32": torch.arange(4, dtype=torch.int32),
    "bool": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
}
PLAIN = {
    "array": np.arange(3),
    "big-endian": np.arange(3, dtype=">f8"),
    "number": np.float32(2.5),
    "list": [1, 2.5, "text", None, (3,)],
    "nested": {"a": {"b": np.eye(2)}},
}


def check(found):
    for name, tensor in TENSORS.items():
        expected = tensor.detach()
        expected = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
        np.testing.assert_array_equal(found[name], expected, err_msg=name, strict=True)
    for name in ("array", "big-endian", "number"):
        np.testing.assert_array_equal(found[name], PLAIN[name])
    assert found["list"] == PLAIN["list"]
    np.testing.assert_array_equal(found["nested"]["a"]["b"], np.eye(2))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_pickles(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(TENSORS | PLAIN, protocol))
    check(read_pickle(tmp_path / "a.pkl"))


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_files_of_torch(tmp_path, zipped):
    torch.save(TENSORS | PLAIN, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    check(read_pickle(tmp_path / "a.pt"))


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy"])
@pytest.mark.parametrize("function", [os.mkdir, eval, getattr, np.load, torch.load, type])
def test_calls_nothing_else(tmp_path, function, kind):
    path, target = tmp_path / "a.pt", str(tmp_path / "made")
    value = {"a": np.arange(3), "b": Call(function, target)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(DataError, match="nothing in it was run: it holds more than") as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_storage_inside_a_pickle_is_restricted_too(tmp_path):
    inner = pickle.dumps(Call(os.mkdir, str(tmp_path / "made")))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Call(torch.storage._load_from_bytes, inner)))
    with pytest.raises(DataError, match="nothing in it was run"):
        read_pickle(tmp_path / "a.pkl")
    assert os.listdir(tmp_path) == ["a.pkl"]


@pytest.mark.parametrize(
    ("size", "stride"), [((1 << 40,), (1,)), ((5,), (1,)), ((4,), (2,)), ((2,), (-1,)), ((1 << 40,), (0,))]
)
def test_a_tensor_cannot_reach_beyond_its_values(tmp_path, size, stride):
    storage = torch.arange(4.0).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    content = Call(torch._utils._rebuild_tensor_v2, typed, 0, size, stride, False, None)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="damaged"):
        read_pickle(tmp_path / "a.pkl")


def test_a_legacy_file_cannot_claim_more_values_than_it_has(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.arange(7.0), path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert raw.count(struct.pack("<q", 7)) == 1
    path.write_bytes(raw.replace(b"K\x07", b"J\xff\xff\xff\x7f", 1))  # the number of values in the pickle
    with pytest.raises(DataError, match="damaged"):
        read_pickle(path)


@pytest.mark.parametrize("raw", [b"", b"hello", b"PK\x03\x04", pickle.dumps(list(range(9)))[:-3]])
def test_damaged_files_are_named(tmp_path, raw):
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.pt is damaged or neither a pickle nor a file of torch\.save"):
        read_pickle(tmp_path / "a.pt")
    with pytest.raises(DataError, match="cannot read"):
        read_pickle(tmp_path / "none.pt")
