"""Gray images become three equal channels, and a network of one input channel gets the gray values."""

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data.readers.registry import open_source
from kdfast.nets import build_net


def gray_source(kind, write, encode, tmp_path):
    """Write training images that are gray in one channel each; return the source and its first image (H, W)."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16), dtype=np.uint8)
    labels = np.arange(6) % 2
    if kind == "npz":
        path = write["npz"](tmp_path / "a.npz", train_images=pixels, train_labels=labels, test_labels=np.zeros(6, int))
    elif kind == "shards":
        members = [
            member
            for index in range(6)
            for member in ((f"{index}.png", encode(pixels[index])), (f"{index}.cls", b"%d" % labels[index]))
        ]
        for part in ("train", "test"):
            write["tar"](tmp_path / f"{part}.tar", members)
        path = tmp_path
    elif kind == "idx":
        path = write["idx"](tmp_path / "a", packed=())
        raw = (path / "train-images-idx3-ubyte").read_bytes()
        pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    else:
        path = write["folder"](tmp_path)
        for index, file in enumerate(sorted(path.glob("train/*/*.png"))):
            image = Image.fromarray(pixels[index % 6])
            (image if kind == "L" else image.convert("1") if kind == "1" else image.convert("RGB")).save(file)
        pixels = np.where(pixels > 127, 255, 0) if kind == "1" else pixels
    return open_source(path), pixels[0]


KINDS = ("npz", "idx", "shards", "L", "RGB")


@pytest.mark.parametrize("kind", KINDS)
def test_three_equal_channels_reach_a_one_channel_network_as_one(kind, write, encode, tmp_path):
    source, first = gray_source(kind, write, encode, tmp_path)
    assert source.gray
    image = source.train.read([0])[0]
    assert np.array_equal(image, np.stack([first] * 3, -1))
    net = build_net("resnet8(channels=1)", len(source.classes)).eval()
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    assert torch.allclose(net(x), net(x[:, :1]), atol=1e-6)


def test_color_in_a_single_image_counts(write, tmp_path):
    root = write["folder"](tmp_path, per_class=20)
    files = sorted(root.glob("train/*/*.png"))
    for file in files:
        Image.new("L", (16, 16), 90).save(file)
    assert open_source(root).gray
    Image.new("RGB", (16, 16), (90, 90, 91)).save(files[-1])
    assert not open_source(root).gray
