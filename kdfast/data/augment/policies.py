"""Augmentation policies: which operations a view applies to its image, and how strongly.

RandAugment applies `n` operations, drawn uniformly and with repetition, all at magnitude `m`, on a scale whose 10 is
the end of AutoAugment's ranges. TrivialAugment applies one operation at a strength drawn uniformly from 0 to 30, with
the wider ranges of its paper. Rotations, shears and translations go either way with equal probability. Solarizing and
posterizing get stronger with the magnitude.

Sources: Cubuk et al., RandAugment: Practical automated data augmentation with a reduced search space, NeurIPS 2020,
with the ranges of Cubuk et al., AutoAugment, CVPR 2019; Müller and Hutter, TrivialAugment: Tuning-free Yet
State-of-the-Art Data Augmentation, ICCV 2021, with its wide augmentation space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.augment import geometry, pixels
from kdfast.data.stateless_random import IntArray, WordArray, hash64, uniform_below
from kdfast.errors import UsageError

Floats = npt.NDArray[np.float64]
Operation = Callable[[Tensor, Tensor], Tensor]

_SCALE = 10  # magnitude of RandAugment at the end of the ranges
_LARGEST = 30  # magnitude that RandAugment accepts, and the largest strength of TrivialAugment
_MOST_OPERATIONS = 14


def _identity(images: Tensor, values: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class _Range:
    """What a magnitude from 0 to 1 means for an operation: from `low` to `high`, `low` being the weak end.

    Attributes:
        low: Value at magnitude 0.
        high: Value at magnitude 1.
        signed: Whether the value is negated with probability 1/2.
        whole: Whether the step from `low` is cut to an integer.
        least: The smallest value, for magnitudes above 1.
        of_side: Whether the value is a fraction of the image's side, and is rounded to pixels.
    """

    low: float = 0.0
    high: float = 0.0
    signed: bool = False
    whole: bool = False
    least: float = -np.inf
    of_side: bool = False


OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    "autocontrast": pixels.autocontrast,
    "equalize": pixels.equalize,
    "rotate": geometry.rotate,
    "solarize": pixels.solarize,
    "color": pixels.color,
    "posterize": pixels.posterize,
    "contrast": pixels.contrast,
    "brightness": pixels.brightness,
    "sharpness": pixels.sharpness,
    "shear-x": geometry.shear_x,
    "shear-y": geometry.shear_y,
    "translate-x": geometry.translate_x,
    "translate-y": geometry.translate_y,
}
"""Name -> function of images and one value for each; recorded views depend on the order."""

_NAMES = tuple(OPERATIONS)


def _ranges(factor: _Range, rotate: float, bits: int, shear: float, translate: _Range) -> dict[str, _Range]:
    return {
        "rotate": _Range(0, rotate, signed=True),
        "solarize": _Range(256, 0, whole=True, least=0),
        "posterize": _Range(8, bits, whole=True, least=1),
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), factor),
        **dict.fromkeys(("shear-x", "shear-y"), _Range(0, shear, signed=True)),
        **dict.fromkeys(("translate-x", "translate-y"), translate),
    }


# AutoAugment translates images of 331 pixels by up to 150.
_AUTOAUGMENT = _ranges(_Range(0.1, 1.9), 30, 4, 0.3, _Range(0, 150 / 331, signed=True, of_side=True))
_WIDE = _ranges(_Range(0.01, 2.0), 135, 2, 0.99, _Range(0, 32, signed=True, whole=True))


@dataclass(frozen=True)
class Policy:
    """A policy and its settings.

    Attributes:
        name: `randaugment` or `trivial`.
        n: Operations for each view.
        m: Magnitude of RandAugment; -1 for a strength drawn for each view.

    Raises:
        UsageError: A value is out of range.
    """

    name: str
    n: int = 1
    m: int = -1

    def __post_init__(self) -> None:
        for name, value, low, high in (("n", self.n, 1, _MOST_OPERATIONS), ("m", self.m, 0, _LARGEST)):
            if self.name == "randaugment" and not low <= value <= high:
                raise UsageError(f"`augment` is randaugment with {name}={value}: pass {name} from {low} to {high}")

    def __str__(self) -> str:
        """Return the policy as `parse_policy` reads it, with all settings."""
        return f"{self.name}:n={self.n},m={self.m}" if self.name == "randaugment" else self.name

    def draw(self, keys: WordArray, sides: tuple[int, int]) -> tuple[IntArray, Floats]:
        """Draw the operations of views.

        Args:
            keys: uint64 `(n,)`, one for each view.
            sides: Height and width of the images, in pixels.

        Returns:
            int64 `(n, k)`, positions in `OPERATIONS`, and float64 `(n, k)`, their values.
        """
        count = len(keys)
        chosen, values = np.zeros((count, self.n), np.int64), np.zeros((count, self.n))
        ranges = _AUTOAUGMENT if self.name == "randaugment" else _WIDE
        for place in range(self.n):
            chosen[:, place] = uniform_below(hash64(keys, place, 0), len(OPERATIONS))
            negative = uniform_below(hash64(keys, place, 1), 2) == 1
            if self.m >= 0:
                magnitude = np.full(count, self.m / _SCALE)
            else:
                magnitude = uniform_below(hash64(keys, place, 2), _LARGEST + 1) / _LARGEST
            for index, name in enumerate(_NAMES):
                here = chosen[:, place] == index
                side = sides[1] if name.endswith("x") else sides[0]
                values[here, place] = _value(ranges.get(name, _Range()), magnitude[here], negative[here], side)
        return chosen, values


def parse_policy(text: str) -> Policy | None:
    """Parse `trivial`, `randaugment` or `randaugment:n=2,m=9`; None if the text is another word.

    Raises:
        UsageError: An option is unknown, repeated, or no integer.
    """
    name, colon, rest = text.partition(":")
    if name == "trivial" and not colon:
        return Policy(name)
    if name != "randaugment":
        return None
    settings = {"n": 2, "m": 9}
    given = set()
    for pair in rest.split(",") if colon else ():
        key, _, value = (word.strip() for word in pair.partition("="))
        if key not in settings or key in given or not value.isdecimal():
            raise UsageError(
                f"`augment` is {text!r}: write randaugment or randaugment:n=2,m=9, with n operations of magnitude m"
            )
        settings[key] = int(value)
        given.add(key)
    return Policy(name, **settings)


def apply_operations(images: Tensor, chosen: IntArray, values: Floats) -> Tensor:
    """Apply operations to images, one after another.

    Args:
        images: uint8 `(n, H, W, 3)`, on any device.
        chosen: int64 `(n, k)`, positions in `OPERATIONS`.
        values: float64 `(n, k)`, their values.

    Returns:
        uint8 `(n, H, W, 3)`.
    """
    images = images.clone()
    for place in range(chosen.shape[1]):
        for index in np.unique(chosen[:, place]):
            rows = np.flatnonzero(chosen[:, place] == index)
            on_device = torch.from_numpy(rows).to(images.device)
            parameters = torch.from_numpy(values[rows, place]).to(images.device)
            images[on_device] = OPERATIONS[_NAMES[index]](images[on_device], parameters)
    return images


def _value(span: _Range, magnitude: Floats, negative: npt.NDArray[np.bool_], side: int) -> Floats:
    moved = magnitude * (span.high - span.low) * (side if span.of_side else 1)
    if span.of_side:
        moved = np.rint(moved)
    elif span.whole:
        # The products of thirds and sixths of the scale are integers that floating point may miss.
        moved = np.trunc(np.round(moved, 9))
    values: Floats = np.maximum(span.low + moved, span.least)
    return np.where(negative, -values, values) if span.signed else values
