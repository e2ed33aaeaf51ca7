"""Every operation gives the pixels that Pillow gives, where the papers' code used Pillow."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from kdfast.data.augment.policies import OPERATIONS

FACTORS = [0.0, 0.01, 0.1, 0.4, 1.0, 1.27, 1.72, 2.0, 5.5]
DEGREES = [4.5 * step for step in range(-30, 31, 3)] + [-90.0, 27.0, 89.9]
SHEARS = [-0.99, -0.27, 0.0, 0.033, 0.3, 0.627, 0.99]
PIXELS = [-33.0, -14.0, -1.0, 0.0, 3.0, 32.0]


def affine(*row: float | None) -> Callable[[Image.Image, float], Image.Image]:
    """Return a transform whose coefficient None is the value."""
    return lambda image, value: image.transform(
        image.size, Image.Transform.AFFINE, [value if number is None else number for number in row]
    )


PILLOW: dict[str, tuple[Callable[[Image.Image, float], Image.Image], list[float]]] = {
    "identity": (lambda image, value: image, [0.0]),
    "autocontrast": (lambda image, value: ImageOps.autocontrast(image), [0.0]),
    "equalize": (lambda image, value: ImageOps.equalize(image), [0.0]),
    "rotate": (lambda image, value: image.rotate(value), DEGREES),
    "solarize": (lambda image, value: ImageOps.solarize(image, int(value)), [0.0, 1.0, 26.0, 128.0, 255.0, 256.0]),
    "color": (lambda image, value: ImageEnhance.Color(image).enhance(value), FACTORS),
    "posterize": (lambda image, value: ImageOps.posterize(image, int(value)), [1.0, 2.0, 4.0, 7.0, 8.0]),
    "contrast": (lambda image, value: ImageEnhance.Contrast(image).enhance(value), FACTORS),
    "brightness": (lambda image, value: ImageEnhance.Brightness(image).enhance(value), FACTORS),
    "sharpness": (lambda image, value: ImageEnhance.Sharpness(image).enhance(value), FACTORS),
    "shear-x": (affine(1, None, 0, 0, 1, 0), SHEARS),
    "shear-y": (affine(1, 0, 0, None, 1, 0), SHEARS),
    "translate-x": (affine(1, 0, None, 0, 1, 0), PIXELS),
    "translate-y": (affine(1, 0, 0, 0, 1, None), PIXELS),
}


def pictures(height: int, width: int) -> np.ndarray:
    """Return images of noise, of few levels, of one level, of two levels, and with a constant channel."""
    images = np.random.default_rng(height).integers(0, 256, (6, height, width, 3), dtype=np.uint8)
    images[1] = images[1] // 4 + 60
    images[2] = 77
    images[3] = (images[3] > 128) * 200
    images[4, :, :, 0] = 3
    images[5] = np.sort(images[5].reshape(-1)).reshape(height, width, 3)
    return images


def test_every_operation_has_its_reference() -> None:
    assert list(PILLOW) == list(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [(32, 32), (7, 9), (2, 5), (1, 1)])
def test_pixels_are_those_of_pillow(name: str, size: tuple[int, int]) -> None:
    reference, values = PILLOW[name]
    images = pictures(*size)
    for value in values:
        given = torch.full((len(images),), value, dtype=torch.float64)
        found = OPERATIONS[name](torch.from_numpy(images), given).numpy()
        expected = [np.asarray(reference(Image.fromarray(image), value)) for image in images]
        np.testing.assert_array_equal(found, expected, err_msg=f"{name} {value}")


def test_each_image_has_a_value_of_its_own() -> None:
    images = torch.from_numpy(pictures(6, 5))
    for name, (_, values) in PILLOW.items():
        given = torch.tensor([values[i % len(values)] for i in range(len(images))], dtype=torch.float64)
        together = OPERATIONS[name](images, given)
        for i in range(len(images)):
            assert torch.equal(OPERATIONS[name](images[i : i + 1], given[i : i + 1])[0], together[i]), name
