"""Mixup and CutMix: each image of a batch is mixed with the next one, and so are their labels.

Mixup: x = s x1 + (1 - s) x2 with the share s from Beta(a, a), one for the batch. CutMix: a box of x1 is replaced by
that of x2; its area is a share 1 - s of the image with s from Beta(a, a), its center is uniform, and s becomes the
share of x1 that is left. The loss is that of the mixed image with s y1 + (1 - s) y2.

Sources: Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, section 2; Yun et al., CutMix, ICCV 2019,
section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

from kdfast.data.stateless_random import IntArray, Purpose, WordArray, hash64, uniform, uniform_below

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mixing:
    """What is mixed in a run; with both, each batch has one of them with probability 1/2.

    Attributes:
        mixup: a of the Beta distribution of mixup; 0: none.
        cutmix: The same of CutMix.
        size: Height and width of the images, in pixels.
    """

    mixup: float
    cutmix: float
    size: tuple[int, int]

    def draw(self, seed: int, epoch: int, batches: IntArray) -> npt.NDArray[np.float32]:
        """Draw how batches are mixed; a draw depends only on (seed, epoch, batch).

        Args:
            seed: Seed of the run.
            epoch: From 0.
            batches: int64 (n,), positions of the batches in the epoch.

        Returns:
            float32 (n, 7): the share of the own label, the weight of the own image outside and inside of a box, and the
            box: top, left, bottom, right in pixels, without the last row and column.
        """
        keys = hash64(Purpose.MIX, seed, epoch, batches)
        both = self.mixup > 0 and self.cutmix > 0
        cuts = uniform_below(hash64(keys, 0), 2) == 1 if both else np.full(len(keys), self.cutmix > 0)
        rows = np.zeros((len(keys), 7))
        rows[~cuts, :3] = _draw_share(keys[~cuts], self.mixup)[:, None]
        rows[cuts] = self._cut(keys[cuts])
        return rows.astype(np.float32)

    def _cut(self, keys: WordArray) -> Floats:
        height, width = self.size
        side = np.sqrt(1 - _draw_share(keys, self.cutmix))
        edges = []
        for length, word in ((height, 2), (width, 3)):
            half = np.trunc(length * side).astype(np.int64) // 2
            center = uniform_below(hash64(keys, word), length)
            edges.append((np.maximum(center - half, 0), np.minimum(center + half, length)))
        (top, bottom), (left, right) = edges
        kept = 1 - (bottom - top) * (right - left) / (height * width)
        return np.stack([kept, np.ones_like(kept), np.zeros_like(kept), top, left, bottom, right], axis=1)


def mix_images(images: Tensor, mixing: Tensor) -> Tensor:
    """Mix each image with the next one of the batch, and the last one with the first.

    Args:
        images: (B, channels, H, W), normalized.
        mixing: float32 (7,), a row of `Mixing.draw`, on the images' device.

    Returns:
        (B, channels, H, W), of the same dtype, in channels_last memory.
    """
    _, outside, inside, top, left, bottom, right = mixing.unbind()
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    weight = torch.where((y >= top) & (y < bottom) & (x >= left) & (x < right), inside, outside)
    own = images.float()
    mixed = weight * own + (1 - weight) * own.roll(1, 0)
    return mixed.to(images.dtype).contiguous(memory_format=torch.channels_last)


def partner_labels(labels: Tensor) -> Tensor:
    """Return the label of the image that `mix_images` mixes each image with, int64 (B,)."""
    return labels.roll(1)


def _draw_share(keys: WordArray, a: float) -> Floats:
    """Return shares from Beta(a, a), by its quantile function."""
    shares: Floats = special.betaincinv(a, a, uniform(hash64(keys, 1)))
    return shares
