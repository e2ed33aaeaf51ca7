"""Every value that a checkpoint's reader uses is covered by a digest, which is compared on every load."""

import copy
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, load_model, save_model

CHANGES = {
    "mean": ("mean", [0.25, 0.4, 0.3]),
    "std": ("std", [0.2, 0.3, 0.5]),
    "class names": ("class_names", list("bacdefghij")),
    "metadata": ("metadata", {"test_top1": 99.5}),
    "a new key": ("note", "text"),
    "no seal": ("seal", None),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    norm = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    net = build_net("resnet8", 10).eval()
    save_model(tmp_path / "m.pt", Model(net, "resnet8", 10, tuple("abcdefghij"), norm, {"test_top1": 61.5}))
    return tmp_path / "m.pt"


def read(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def as_version_1(file: Path) -> None:
    content = {name: value for name, value in read(file).items() if name != "seal"}
    torch.save({**content, "version": 1}, file)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_field_is_refused(file: Path, change: str) -> None:
    name, value = CHANGES[change]
    torch.save({**read(file), name: value}, file)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))} is damaged"):
        load_model(file)


def test_a_changed_batch_counter_is_refused(file: Path) -> None:
    content = read(file)
    name = next(name for name in content["state_dict"] if name.endswith("num_batches_tracked"))
    content["state_dict"][name] += 1
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="seal"):
        load_model(file)


@pytest.mark.parametrize("version", [1, 2])
def test_no_flipped_bit_changes_what_is_read(file: Path, tmp_path: Path, version: int) -> None:
    if version == 1:
        as_version_1(file)
    model, raw = load_model(file), file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    draw, refused, damaged = random.Random(0), 0, tmp_path / "damaged.pt"
    for _ in range(200):
        content, position = bytearray(raw), info.header_offset + draw.randrange(info.file_size)
        content[position] ^= 1 << draw.randrange(8)
        damaged.write_bytes(content)
        try:
            found = load_model(damaged)
        except CheckpointError:
            refused += 1
            continue
        for name in ("name", "classes", "class_names", "normalization", "metadata", "digest"):
            assert getattr(found, name) == getattr(model, name), f"{name} changed by a bit at {position}"
    assert refused > 100


def test_files_of_the_version_without_seals_load(file: Path) -> None:
    model = load_model(file)
    as_version_1(file)
    older = load_model(file)
    assert (older.digest, older.metadata, older.class_names) == (model.digest, model.metadata, model.class_names)
    # A sealed file does not become an unsealed one by losing its seal.
    torch.save({**read(file), "version": 2}, file)
    with pytest.raises(CheckpointError, match="seal"):
        load_model(file)


def test_the_digest_that_caches_record_covers_the_weights_alone(file: Path) -> None:
    model = load_model(file)
    other = copy.deepcopy(model)
    other.metadata["test_top1"] = 1.0
    save_model(file, other)
    assert load_model(file).digest == model.digest
