import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kdfast.data.readers.datasets import from_datasets
from kdfast.errors import DataError, UsageError

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
        (lambda i: PIXELS[i].astype(np.float32), (0, 1), "float32 .* pass `value_range`"),
        (lambda i: PIXELS[i].astype(np.int64), (0, 1), "int64 .* pass `value_range`"),
        (lambda i: PIXELS[i] > 9, (0, 1), "bool .* pass `value_range`"),
        (lambda i: torch.from_numpy(PIXELS[i]).movedim(-1, 0).short(), (0, 1), "int16 .* pass `value_range`"),
        (lambda i: b"\x89PNG", (0, 1), "an image of type bytes, which is not decoded"),
        (lambda i: {"bytes": b"", "path": None}, (0, 1), "an image of type dict, which is not decoded"),
        (lambda i: None, (0, 1), "an image of type NoneType"),
        (lambda i: PIXELS[i].transpose(2, 0, 1), (0, 1), "uint8 of shape"),
        (FORMS["array"], ("cat", "dog"), "the label is 'cat', not the number of a class"),
        (lambda i: PIXELS[i][: 8 - i], (0, 1), "resize all images to one size"),
        (FORMS["array"], (0, 1.5), "not a pair"),
        (FORMS["array"], (0, 2), "no training sample has label 1"),
        (FORMS["array"], (), "empty"),
    ],
)
def test_rejects_wrong_items(make, labels, message):
    with pytest.raises(DataError, match=message):
        from_datasets(Items(make, labels), Items(FORMS["array"]))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Items(FORMS["array"]))


class CountedStream(Stream):
    def __len__(self):
        return 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Stream(), "training data set has no length"),
        (iter([]), "training data set has no length"),
        (CountedStream(), "a CountedStream, has no items by index"),
        (DataLoader(Items(FORMS["array"]), batch_size=2), "a DataLoader, has no items by index"),
    ],
)
def test_rejects_streams_and_loaders(data, message):
    with pytest.raises(DataError, match=message):
        from_datasets(data, Items(FORMS["array"]))


def test_rejects_labels_outside_the_named_classes():
    data = Items(FORMS["array"])
    with pytest.raises(DataError, match="there are 2 classes"):
        from_datasets(data, data, ["a", "b"])


DEEP = {
    "16 bits": (lambda grey: Image.fromarray(grey), "uint16"),
    "16 bits, big endian": (lambda grey: Image.fromarray(grey.astype(">u2")), "u2|uint16"),
    "32 bits": (lambda grey: Image.fromarray(grey.astype(np.int32)), "int32"),
    "floating point": (lambda grey: Image.fromarray(grey.astype(np.float32)), "float32"),
    "array": (lambda grey: grey, "uint16"),
    "float array": (lambda grey: grey.astype(np.float64)[..., np.newaxis], "float64"),
    "tensor": (lambda grey: torch.from_numpy(grey.astype(np.int32))[np.newaxis], "int32"),
    "float tensor": (lambda grey: torch.from_numpy(grey.astype(np.float32))[np.newaxis], "before normalization"),
}
GREY = np.linspace(0, 60000, 6 * 8 * 10).astype(np.uint16).reshape(6, 8, 10)


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_eight_bits_are_refused_or_scaled_but_never_clipped(kind):
    make, named = DEEP[kind]
    data = Items(lambda i: make(GREY[i]))
    with pytest.raises(DataError, match=rf"training sample 0 is .*({named}).*`value_range`"):
        from_datasets(data, data)
    scaled = from_datasets(data, data, value_range=(0, 60000)).train.read(range(6))
    assert np.array_equal(scaled, np.rint(GREY / 60000 * 255).astype(np.uint8)[..., np.newaxis].repeat(3, -1))
    with pytest.raises(DataError, match="outside of 0 to 50000"):
        from_datasets(data, data, value_range=(0, 50000))


def test_a_value_range_leaves_images_of_eight_bits_alone():
    data = Items(lambda i: FORMS["pil"](i) if i % 2 else PIXELS[i])
    assert np.array_equal(from_datasets(data, data, value_range=(0, 65535)).train.read(range(6)), PIXELS)


def test_a_value_range_takes_normalized_tensors():
    data = Items(lambda i: torch.from_numpy(PIXELS[i]).movedim(-1, 0).float() / 127.5 - 1)
    assert np.array_equal(from_datasets(data, data, value_range=(-1, 1)).train.read(range(6)), PIXELS)


@pytest.mark.parametrize("value_range", [(1, 1), (1, 0), (0, float("inf")), (float("nan"), 1)])
def test_rejects_wrong_ranges(value_range):
    data = Items(FORMS["array"])
    with pytest.raises(UsageError, match="`value_range` is"):
        from_datasets(data, data, value_range=value_range)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_eight_bits_is_converted(mode):
    image = Image.fromarray(PIXELS[0])
    image = image.convert("L").convert(mode) if mode in ("LA", "PA") else image
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    image = image.convert(mode)
    data = Items(lambda i: image)
    assert np.array_equal(from_datasets(data, data).train.read([0])[0], np.asarray(image.convert("RGB")))


class Dicts(list):
    """Items as of a Hugging Face Dataset."""

    def __init__(self, image="image", label="label", names=None, **more):
        super().__init__({image: Image.fromarray(PIXELS[i]), label: i % 3, **more} for i in range(6))
        if names:
            self.features = {image: object(), label: type("ClassLabel", (), {"names": names})()}


@pytest.mark.parametrize("image", ["image", "img", "pixel_values", "jpg"])
@pytest.mark.parametrize("label", ["label", "labels", "cls"])
def test_accepts_dicts(image, label):
    data = Dicts(image, label)
    assert from_datasets(data, data).fingerprint == from_datasets(Items(FORMS["array"]), data).fingerprint


def test_class_names_come_from_the_features():
    data = Dicts(names=["a", "b", "c"])
    assert from_datasets(data, data).classes == ("a", "b", "c")
    assert from_datasets(data, data, ("x", "y", "z")).classes == ("x", "y", "z")
    assert from_datasets(data, Dicts()).classes == ("a", "b", "c")
    with pytest.raises(DataError, match="training data has the classes a, b, c, the test data c, b, a"):
        from_datasets(data, Dicts(names=["c", "b", "a"]))


def test_class_names_come_from_torchvision():
    data, other = Items(FORMS["array"]), Items(FORMS["array"])
    data.classes, other.classes = ["a", "b", "c"], ["a", "b", "c", "d"]
    assert from_datasets(data, data).classes == ("a", "b", "c")
    with pytest.raises(DataError, match="test data a, b, c, d"):
        from_datasets(data, other)


def test_keys_can_be_named():
    data = Dicts("photo", "coarse_label", fine_label=7)
    source = from_datasets(data, data, image_key="photo", label_key="coarse_label")
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("data", "keys", "message"),
    [
        (Dicts("photo"), {}, "has the keys photo, label: pass `image_key`"),
        (Dicts(label="coarse_label", fine_label=1), {}, "image, coarse_label, fine_label: pass `label_key`"),
        (Dicts(img=None), {}, "image, label, img: pass `image_key`"),
        (Dicts(), {"label_key": "absent"}, "image, label: pass `label_key`"),
        ([*Dicts()[:3], {"image": PIXELS[3]}], {}, "training sample 3 is not a pair .*: 'label'"),
        ({"train": Dicts(), "test": Dicts()}, {}, "training data is a dict of train, test: pass one of its splits"),
        (iter(Dicts()), {}, "has no length"),
    ],
)
def test_rejects_other_dicts(data, keys, message):
    with pytest.raises(DataError, match=message):
        from_datasets(data, Dicts(), **keys)
