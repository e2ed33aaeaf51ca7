import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from kdfast.data.readers.datasets import from_datasets
from kdfast.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)


class Items(Dataset):
    def __init__(self, make, labels=(0, 1, 2, 0, 1, 2)):
        self.make, self.labels = make, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.make(index), self.labels[index]


FORMS = {
    "pil": lambda i: Image.fromarray(PIXELS[i]),
    "array": lambda i: PIXELS[i],
    "tensor": lambda i: torch.from_numpy(PIXELS[i]).movedim(-1, 0),
    "float tensor": lambda i: torch.from_numpy(PIXELS[i]).movedim(-1, 0).float() / 255,
}


@pytest.mark.parametrize("form", FORMS)
def test_accepts_every_form_of_images(form):
    data = Items(FORMS[form])
    source = from_datasets(data, data, ["a", "b", "c"])
    assert np.array_equal(source.train.read(range(6)), PIXELS)
    assert source.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.fingerprint == from_datasets(Items(FORMS["array"]), data).fingerprint


@pytest.mark.parametrize(
    "make", [lambda i: PIXELS[i][..., 0], lambda i: torch.from_numpy(PIXELS[i][..., 0]), lambda i: PIXELS[i][..., :1]]
)
def test_gray_images_become_rgb(make):
    source = from_datasets(Items(make), Items(make))
    assert np.array_equal(source.train.read(range(6)), np.repeat(PIXELS[..., :1], 3, -1))


@pytest.mark.parametrize("label", [lambda i: torch.tensor(i), lambda i: np.int32(i), lambda i: torch.tensor([i])])
def test_accepts_every_form_of_labels(label):
    data = Items(FORMS["array"], [label(i) for i in (0, 1, 1)])
    assert from_datasets(data, data).train.labels.tolist() == [0, 1, 1]


def test_rejects_a_set_that_augments():
    rng = np.random.default_rng(0)
    data = Items(lambda i: rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="differs between two reads"):
        from_datasets(data, data)


@pytest.mark.parametrize(
    ("make", "labels", "message"),
    [
        (lambda i: FORMS["float tensor"](i) * 2 - 0.5, (0, 1), "before normalization"),
        (lambda i: torch.full((3, 8, 8), float("nan")), (0, 1), "before normalization|differs"),
        (lambda i: PIXELS[i].astype(np.float32), (0, 1), "float32"),
        (lambda i: PIXELS[i][: 8 - i], (0, 1), "resize all images to one size"),
        (FORMS["array"], (0, 1.5), "not a pair"),
        (FORMS["array"], (0, 2), "no training sample has label 1"),
        (FORMS["array"], (), "empty"),
    ],
)
def test_rejects_wrong_items(make, labels, message):
    with pytest.raises(DataError, match=message):
        from_datasets(Items(make, labels), Items(FORMS["array"]))


def test_rejects_labels_outside_the_named_classes():
    data = Items(FORMS["array"])
    with pytest.raises(DataError, match="there are 2 classes"):
        from_datasets(data, data, ["a", "b"])
