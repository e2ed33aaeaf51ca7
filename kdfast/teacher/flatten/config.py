"""Settings of flattening, checked on construction."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kdfast.errors import UsageError, look_up
from kdfast.teacher.flatten.perturbations import SHARPNESS

_LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True)
class FlattenConfig:
    """What determines the flattened weights, given the teacher and the data.

    Attributes:
        sharpness: A key of `SHARPNESS`: where the gradient of a step is taken.
        rho: Size of the perturbation, at least 0: for `fsam` its norm, for `lpf` the standard deviation of the noise
            relative to the norm of a filter. None: the default of the sharpness; it is replaced by that number.
        iterations: Steps of SGD.
        batch_size: Samples of a step; the last, smaller batch of a pass over the held-out part is kept.
        lr: Learning rate, constant.
        momentum: Momentum of SGD, in [0, 1), without Nesterov.
        clip: Largest norm of the gradient of all weights together, to which larger ones are scaled; 0: any.
        held: Share of each class to hold out, at least 20 samples but at most half of the class.
        views: Augmentation views per sample; 0: all. 1: the unaugmented images.
        seed: Seed of the held-out part, the order, the views and the noise.

    Raises:
        UsageError: A value is out of range, or the sharpness is unknown.
    """

    sharpness: str = "fsam"
    rho: float | None = None
    iterations: int = 1000
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    clip: float = 1.0
    held: float = 0.05
    views: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        kind = look_up(SHARPNESS, self.sharpness, "sharpness")
        if self.rho is None:
            object.__setattr__(self, "rho", kind.default_rho)
        elif self.rho and self.sharpness == "none":
            raise UsageError(f"`rho` is {self.rho}, but `sharpness` none moves nothing: omit it, or pass fsam or lpf")
        for name, least in (("iterations", 1), ("batch_size", 1), ("views", 0), ("seed", 0)):
            most = 2**63 - 1 if name == "seed" else _LARGEST_COUNT
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"`{name}` is {getattr(self, name)}: pass an integer from {least} to {most}")
        for name in ("lr", "rho", "momentum", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"`{name}` is {getattr(self, name)}: pass a finite number, 0 or more")
        if self.momentum >= 1:
            raise UsageError(f"`momentum` is {self.momentum}: pass a number in [0, 1)")
        if not 0 < self.held <= 0.5:
            raise UsageError(f"`held` is {self.held}: pass a share above 0 and at most 0.5")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return dataclasses.asdict(self)
