"""Input normalization of a network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.errors import UsageError

# Wide enough for any normalization of pixels in 0..1, too narrow for most of those meant for 0..255.
_MEAN_RANGE = (-1, 2)
_MAX_STD = 2


@dataclass(frozen=True)
class Normalization:
    """Input normalization of a network: `(x / 255 - mean) / std` for each channel, with pixels `x` in 0..255.

    Attributes:
        mean: Mean of the red, green and blue channel, on the scale 0 to 1; each in -1..2.
        std: Standard deviations, likewise; each positive, at most 2.

    Raises:
        UsageError: There are not three of each, or a value is out of range, as values on the scale 0 to 255 are.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise UsageError(
                f"normalization {self.mean}, {self.std}: pass one `mean` and one `std` for each of 3 channels"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise UsageError(f"normalization {self.mean}, {self.std}: `mean` must be finite and `std` positive")
        low, high = _MEAN_RANGE
        if not (low <= min(self.mean) and max(self.mean) <= high and max(self.std) <= _MAX_STD):
            raise UsageError(
                f"normalization {self.mean}, {self.std}: `mean` must be in {low}..{high} and `std` at most {_MAX_STD}, "
                "for pixels scaled to 0..1; these look like 0..255 values: divide them by 255"
            )

    def affine(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the normalization as `pixel * scale + bias`.

        Args:
            dtype: float32 or float64; values are computed in float64 and rounded once.

        Returns:
            `(2, 3)` on the CPU: scale and bias of each channel.
        """
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.mean, self.std))
        return torch.stack([1 / (255 * std), -mean / std]).to(dtype)
