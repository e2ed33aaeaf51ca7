"""A file of another kind is named, and the recipe for its weights works."""

import re
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError
from kdfast.nets import build_net
from kdfast.nets.foreign import read_torch_file
from kdfast.nets.importing import import_checkpoint


class Settings:
    """A class that no restricted unpickler knows."""


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return build_net("resnet8", 10).eval()


def imported(path):
    norm = Normalization((0.5,) * 3, (0.2,) * 3)
    return import_checkpoint(path, net="resnet8", classes=10, normalization=norm)[0]


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        imported(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_torchscript(path, net):
    torch.jit.save(torch.jit.trace(net, torch.randn(1, 3, 8, 8)), path)


def write_lightning(path, net):
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": {"settings": Settings()}}, path)


def write_npz(path, net):
    with open(path, "wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in net.state_dict().items()})


def write_exported(path, net):
    torch.export.save(torch.export.export(net, (torch.randn(1, 3, 8, 8),)), path)


RECIPES = {
    "TorchScript": (write_torchscript, "is a TorchScript archive"),
    "torch.export": (write_exported, r"is a program of torch\.export"),
    "unknown class": (write_lightning, "nothing in it was run"),
    "npz": (write_npz, r"is an \.npz archive"),
}


@pytest.mark.filterwarnings("ignore")  # of tracing and of exporting
@pytest.mark.parametrize("kind", RECIPES)
def test_the_recipe_of_the_message_saves_weights_that_are_imported(tmp_path, monkeypatch, net, kind):
    write, words = RECIPES[kind]
    path = tmp_path / ("c.pt2" if kind == "torch.export" else "c.pth")
    write(path, net)
    message = refusal(path)
    assert re.search(words, message)
    assert "damaged" not in message
    recipe = re.search(r'torch\.save\(.*, "weights\.pt"\)', message)
    assert recipe is not None, message
    monkeypatch.chdir(tmp_path)
    exec(recipe[0], {"torch": torch, "numpy": np})
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(imported("weights.pt").net(images), net(images))


STARTS = {
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
    "a page without a type": (b"<HTML><body>404</body></HTML>", "is a web page"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "compressed with gzip"),
}


@pytest.mark.parametrize("kind", STARTS)
def test_names_files_that_are_no_checkpoints(tmp_path, kind):
    content, words = STARTS[kind]
    (tmp_path / "c.pth").write_bytes(content)
    message = refusal(tmp_path / "c.pth")
    assert words in message
    assert "damaged" not in message


def test_names_files_by_their_suffix(tmp_path, net):
    safetensors.torch.save_file(net.state_dict(), tmp_path / "c.pth")
    assert "give it a name that ends in .safetensors" in refusal(tmp_path / "c.pth")
    (tmp_path / "c.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    assert "is an ONNX file" in refusal(tmp_path / "c.onnx")


def test_an_unknown_file_is_called_damaged(tmp_path):
    (tmp_path / "c.pth").write_bytes(b"PK\x03\x04 and nothing else")
    assert "truncated, damaged or of another kind" in refusal(tmp_path / "c.pth")


def test_an_archive_that_unpacks_to_more_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """torch.load unpacks compressed members, so a few MB could fill any memory."""
    torch.save({"weight": torch.zeros(1 << 20)}, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as small, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for member in small.infolist():
            bomb.writestr(member.filename, small.read(member), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    assert read_torch_file(tmp_path / "bomb.pt")["weight"].shape == (1 << 20,)
    monkeypatch.setattr("kdfast.nets.foreign.available_memory", lambda: 1_000_000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match=r"bomb\.pt takes 0\.0 GB, and 0\.0 GB of memory are free"):
        read_torch_file(tmp_path / "bomb.pt")
