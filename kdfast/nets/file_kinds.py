"""Recognize files that are no checkpoints of torch.save, and say how to get the weights out of them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

# How a file starts -> what it is and what to do.
_STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: fetch the file with git lfs pull"),
    (b"<!doctype html", "is a web page, not a checkpoint: download the file itself"),
    (b"<html", "is a web page, not a checkpoint: download the file itself"),
    (b"\x89hdf\r\n", "is an HDF5 file, not one of torch.save: load it with its own library, save the weights as a "
     ".safetensors file, and pass that"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it, and pass the checkpoint inside"),
)  # fmt: skip
_TRUST = "only if you trust its author, because loading it may run code"


def describe_kind(file: Path) -> str | None:
    """Return what a file is instead of a checkpoint of torch.save, and what to do; None for an unknown kind."""
    with open(file, "rb") as stream:
        start = stream.read(64)
    for magic, advice in _STARTS:
        if start.lstrip().lower().startswith(magic):
            return advice
    if start[8:10] == b'{"' and file.suffix != ".safetensors":
        return "is a .safetensors file: give it a name that ends in .safetensors"
    if file.suffix == ".onnx":
        return "is an ONNX file, which kdfast does not read: use the torch checkpoint that it was exported from"
    try:
        with zipfile.ZipFile(file) as archive:
            return _describe_archive(file.name, archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def _describe_archive(name: str, members: Iterable[str]) -> str | None:
    ends = {member.partition("/")[2] for member in members} | set(members)
    if "constants.pkl" in ends or any(end.startswith("code/") for end in ends):
        return (
            "is a TorchScript archive, which holds code besides the weights. Save the weights alone, "
            f'{_TRUST}: torch.save(torch.jit.load("{name}", map_location="cpu").state_dict(), "weights.pt"); then pass '
            "weights.pt"
        )
    if "archive_format" in ends or "serialized_exported_program.json" in ends:
        return (
            "is a program of torch.export. Save the weights alone, "
            f'{_TRUST}: torch.save(dict(torch.export.load("{name}").state_dict), "weights.pt"); then pass weights.pt'
        )
    if any(end.endswith(".npy") for end in ends):
        return (
            "is an .npz archive of numpy arrays. Save them as tensors: torch.save({name: torch.from_numpy(array) for "
            f'name, array in numpy.load("{name}").items()}}, "weights.pt"); then pass weights.pt'
        )
    return None


def resave_recipe(file: Path) -> str:
    """Return how the owner of a file whose pickle holds more than plain values can save its weights alone."""
    return (
        f'torch.save(torch.load("{file.name}", map_location="cpu", weights_only=False)["state_dict"], "weights.pt"), '
        "with the key under which this file has its weights (a whole pickled network has .state_dict() instead); this "
        f"runs the code in the file, so do it {_TRUST}"
    )
