"""Augmentation as a finite, seeded set of views, so that a teacher's logits on each can be cached.

A view is one outcome of the augmentation, named by a view id: for 32x32 images zero-pad 4 + crop + flip has
9 * 9 * 2 = 162 views, and for large images each sample has a fixed number of random resized crops. A run may use fewer
views per sample (`n_views`); the view index, 0 to n_views - 1, is the position among them. The views of a sample and
their order are hashes of (seed, sample, epoch): the same on any machine, rank, batch split and loader.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdfast.data.augment.crops import crop_boxes
from kdfast.data.augment.policies import apply_operations, parse_policy
from kdfast.data.stateless_random import (
    IntArray,
    Purpose,
    hash64,
    permutation_element,
    permutation_prefix,
    uniform_below,
)
from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.ops.backends import resolve
from kdfast.ops.views import check_images, crop_views, gather_views

# Crops of version 1 were resized by PyTorch, in floating point, with bits that depended on the machine.
_VERSIONS = {"shift": 1, "crop": 2}
# Wide enough for any normalization of pixels in 0..1, too narrow for most of those meant for 0..255.
_MEAN_RANGE = (-1, 2)
_MAX_STD = 2
# Third word of the hash that draws the shift before a policy; those of its operations count from 0.
_SHIFT = 1 << 16


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


@dataclass(frozen=True)
class ViewSpec:
    """The set of views of a data set.

    Attributes:
        kind: "shift": crops of the zero-padded image at its own size; "crop": random resized crops.
        size: Height and width of a view, in pixels; for "shift", also of the images.
        pad: For "shift": black border on each side, in pixels.
        flip: Whether a view may be mirrored left to right.
        crops: For "crop" and with a policy: number of views per sample, including the identity.
        scale: For "crop": smallest and largest area of a box, as a fraction of the image's.
        ratio: For "crop": smallest and largest width / height of a box.
        seed: For "crop" and with a policy: seed of the boxes, shifts and operations.
        version: Version of the mapping from view ids to images; 0 is replaced by the current one.
        policy: Operations that follow the shift or crop in every view but the identity, as `parse_policy` reads them;
            None for none.
    """

    kind: Literal["shift", "crop"]
    size: tuple[int, int]
    pad: int = 0
    flip: bool = False
    crops: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    seed: int = 0
    version: int = 0
    policy: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("shift", "crop"):
            raise UsageError(f"`kind` of views is {self.kind!r}: must be 'shift' or 'crop'")
        current = _VERSIONS[self.kind]
        if self.version == 0:
            object.__setattr__(self, "version", current)
        if self.version != current:
            raise DataError(
                f"{self.kind} views have version {self.version}; this kdfast needs version {current}: rebuild the cache"
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise UsageError(f"`size` of views is {self.size}: must be a positive height and width")
        if not 0 <= self.pad <= min(self.size):
            raise UsageError(f"`pad` is {self.pad}: must be 0 to {min(self.size)} for views of size {self.size}")
        if self.policy is not None and parse_policy(self.policy) is None:
            raise UsageError(f"`policy` of views is {self.policy!r}: must be 'randaugment' or 'trivial'")
        if self.crops < 1 or (not self.is_drawn and self.crops != 1) or (self.kind == "crop" and self.pad):
            raise UsageError(
                f"{self.kind} views with `pad` {self.pad}, `crops` {self.crops}: pad is for shift, crops for crop"
            )
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1] < math.inf):
            raise UsageError(
                f"`scale` is {self.scale}, `ratio` {self.ratio}: must have 0 < low <= high, and a scale of at most 1"
            )

    @property
    def count(self) -> int:
        """Number of view ids."""
        return self.crops if self.is_drawn else self._shifts

    @property
    def identity(self) -> int:
        """Id of the view that leaves the image unchanged (for "crop": the whole image, resized)."""
        return 0 if self.is_drawn else self._unshifted

    @property
    def is_drawn(self) -> bool:
        """Whether what a view id does is drawn for each sample, on the CPU, and not the same for all samples."""
        return self.kind == "crop" or self.policy is not None

    @property
    def has_boxes(self) -> bool:
        """Whether a view is a box of its image, which `view_boxes` draws ahead."""
        return self.kind == "crop" and self.policy is None

    @property
    def _shifts(self) -> int:
        return (2 * self.pad + 1) ** 2 * (2 if self.flip else 1)

    @property
    def _unshifted(self) -> int:
        return self.pad * (2 * self.pad + 2) * (2 if self.flip else 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; a policy only if there is one, as in files of earlier versions."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        if self.policy is None:
            del fields["policy"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ViewSpec:
        """Return the spec whose fields `to_dict` returned.

        Raises:
            DataError: A field is missing, unknown or invalid, or the version differs.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(fields) | {"policy"} != names:
            needed = sorted(names - {"policy"})
            raise DataError(f"view spec with fields {sorted(fields)}: needs exactly {needed}; rebuild the cache")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        try:
            return cls(**values)
        except (TypeError, UsageError) as exc:
            raise DataError(f"damaged view spec {fields}: {exc}") from exc


def view_table(spec: ViewSpec, view_seed: int, sample_ids: IntArray, n_views: int) -> IntArray:
    """Return the view ids of each sample, by view index.

    Column 0 is the identity. The others are distinct and chosen per sample by the seed, so that a table of fewer views
    is a prefix of a table of more. With all views (`n_views == spec.count`) each row is `0, 1, ..., count - 1` instead.

    Args:
        spec: The set of views.
        view_seed: Seed of the choice.
        sample_ids: `(n,)` original sample indices.
        n_views: Views per sample, in `[1, spec.count]`.

    Returns:
        `(n, n_views)` int64 view ids.

    Raises:
        UsageError: `n_views` is out of range.
    """
    if not 1 <= n_views <= spec.count:
        raise UsageError(f"`n_views` is {n_views}, and this data has {spec.count} views: must be 1 to {spec.count}")
    if n_views == spec.count:
        return np.tile(np.arange(n_views, dtype=np.int64), (len(sample_ids), 1))
    out = np.full((len(sample_ids), n_views), spec.identity, np.int64)
    others = permutation_prefix(n_views - 1, spec.count - 1, hash64(Purpose.VIEW_TABLE, view_seed, sample_ids))
    out[:, 1:] = others + (others >= spec.identity)
    return out


def draw_view_indices(seed: int, epoch: int, sample_ids: IntArray, n_views: int) -> IntArray:
    """Draw the view index of each sample in an epoch.

    In each block of `n_views` epochs (0 to n_views - 1, and so on) a sample uses each of its views once, in an order
    drawn for each sample and block. A draw depends only on (seed, epoch, sample).

    Args:
        seed: Seed of the run.
        epoch: From 0.
        sample_ids: `(n,)` original sample indices.
        n_views: Views per sample, at least 1.

    Returns:
        `(n,)` int64 in `[0, n_views)`: columns of `view_table`.

    Raises:
        UsageError: `n_views` is less than 1 or the epoch is negative.
    """
    if n_views < 1 or epoch < 0:
        raise UsageError(f"{n_views} views per sample in epoch {epoch}: pass at least 1 view, and epochs from 0")
    block, position = divmod(epoch, n_views)
    keys = hash64(Purpose.VIEW_INDEX, seed, sample_ids, block)
    if resolve("draws", "cpu") == "native":
        from kdfast.ops import native

        return native.permutation_element(position, n_views, keys)
    return permutation_element(np.array([position], np.int64), n_views, keys)


def apply_views(
    images_u8: Tensor,
    view_ids: Tensor | IntArray,
    spec: ViewSpec,
    norm: Normalization,
    *,
    sample_ids: Tensor | IntArray | None = None,
    rows: Tensor | None = None,
    boxes: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Apply a view to each image and normalize the result, for the teacher and the student.

    The black border of a shift is added to the uint8 image, before normalization.

    Args:
        images_u8: `(N, H, W, 3)` uint8, on any device.
        view_ids: `(B,)` integers in `[0, spec.count)`. Unless `spec.is_drawn` they may be on the images' device,
            without a synchronization: there an id out of range makes the view NaN instead of raising an error.
        spec: The set of views.
        norm: Input normalization of the network.
        sample_ids: `(B,)` original sample indices; required if `spec.is_drawn`, unless the boxes are given.
        rows: `(B,)` int64 on the images' device, the image of each view; None for image i, and N = B.
        boxes: `(B, 5)` int32 on the images' device, as `view_boxes` returns for these views, if `spec.has_boxes`:
            nothing is then drawn here, nor copied to the images' device. None: drawn here.
        dtype: float32, bfloat16, float16 or float64.

    Returns:
        `(B, 3, h, w)` in `dtype`, in channels_last memory, on the images' device.

    Raises:
        ShapeError: The images, ids or dtype do not match the above.
        DataError: The images are not uint8.
        UsageError: `sample_ids` is missing for views that depend on them.
    """
    check_images(images_u8)
    views = _as_ids(view_ids, len(images_u8 if rows is None else rows), "view_ids")
    if spec.is_drawn and boxes is None:
        views = views.cpu()
    if views.device.type == "cpu" and len(views):
        low, high = (int(x) for x in torch.aminmax(views))
        if low < 0 or high >= spec.count:
            raise ShapeError(f"`view_ids` go from {low} to {high}: must be 0 to {spec.count - 1}")
    if not dtype.is_floating_point:
        raise ShapeError(f"`dtype` is {dtype}: must be a floating dtype, such as torch.float32")
    affine = _affine(norm, torch.promote_types(dtype, torch.float32), images_u8.device)
    height, width = images_u8.shape[1:3]
    if spec.kind == "shift" and (height, width) != spec.size:
        raise ShapeError(f"the images have {height}x{width} pixels; these views need {spec.size[0]}x{spec.size[1]}")
    if not spec.is_drawn:
        views = views.to(images_u8.device, non_blocking=True)
        return gather_views(images_u8, rows, views, affine, pad=spec.pad, flip=spec.flip, dtype=dtype)
    if spec.has_boxes and boxes is not None:
        return crop_views(images_u8, boxes, affine, size=spec.size, rows=rows, dtype=dtype)
    if sample_ids is None:
        raise UsageError("`sample_ids` is missing; these views depend on it: pass the original indices")
    ids = _as_ids(sample_ids, len(views), "sample_ids").cpu().numpy()
    if spec.policy is None:
        return _crop(images_u8, rows, ids, views.numpy(), spec, affine, dtype)
    pixels = _apply_policy(images_u8, rows, ids, views.numpy(), spec)
    unmoved = torch.zeros(len(views), dtype=torch.int64, device=pixels.device)
    return gather_views(pixels, None, unmoved, affine, pad=0, flip=False, dtype=dtype)


def view_boxes(spec: ViewSpec, sample_ids: IntArray, view_ids: IntArray, image_size: tuple[int, int]) -> Tensor:
    """Draw the boxes of views that are crops.

    Args:
        spec: A set of crops.
        sample_ids: `(B,)` int64, original sample indices.
        view_ids: `(B,)` int64, in `[0, spec.count)`.
        image_size: Height and width of the images, in pixels.

    Returns:
        `(B, 5)` int32 on the CPU: top, left, height, width in pixels, and flip in {0, 1}.
    """
    keys = hash64(Purpose.CROP, spec.seed, sample_ids, view_ids)
    whole = view_ids == spec.identity
    boxes = crop_boxes(keys, image_size, scale=spec.scale, ratio=spec.ratio, flip=spec.flip, whole=whole)
    return torch.from_numpy(boxes)


def _crop(
    images: Tensor,
    rows: Tensor | None,
    ids: IntArray,
    views: IntArray,
    spec: ViewSpec,
    affine: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    boxes = view_boxes(spec, ids, views, (images.shape[1], images.shape[2])).to(images.device)
    return crop_views(images, boxes, affine, size=spec.size, rows=rows, dtype=dtype)


def _apply_policy(images: Tensor, rows: Tensor | None, ids: IntArray, views: IntArray, spec: ViewSpec) -> Tensor:
    """Return the views of a policy as uint8 pixels `(B, h, w, 3)`: the shift or crop, then the operations."""
    unscaled = torch.tensor([[1.0] * 3, [0.0] * 3], device=images.device)
    keys = hash64(Purpose.POLICY, spec.seed, ids, views)
    whole = views == spec.identity
    if spec.kind == "crop":
        base = _crop(images, rows, ids, views, spec, unscaled, torch.float32)
    else:
        shifts = np.where(whole, spec._unshifted, uniform_below(hash64(keys, _SHIFT), spec._shifts))
        on_device = torch.from_numpy(shifts).to(images.device)
        base = gather_views(images, rows, on_device, unscaled, pad=spec.pad, flip=spec.flip)
    pixels = base.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    policy = parse_policy(str(spec.policy))
    assert policy is not None, "the spec has checked it"
    chosen, values = policy.draw(keys, spec.size)
    chosen[whole] = 0  # the identity
    return apply_operations(pixels, chosen, values)


# Never evicted: a CUDA graph remembers the address of what it reads.
@functools.cache
def _affine(norm: Normalization, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        return norm.affine(dtype).to(device)


def _as_ids(ids: Tensor | IntArray, count: int, name: str) -> Tensor:
    """Return `ids` as an int64 tensor `(count,)`, or raise a ShapeError that refers to it as `name`."""
    tensor = ids if isinstance(ids, Tensor) else torch.tensor(np.asarray(ids))
    if tensor.shape != (count,) or tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ShapeError(f"`{name}` is {dtype} {tuple(tensor.shape)}: must be integers ({count},), one for each image")
    return tensor.long()
