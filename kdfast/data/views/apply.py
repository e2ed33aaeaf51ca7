"""From images and view ids to the inputs of a network."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from kdfast.data.augment.crops import crop_boxes
from kdfast.data.augment.policies import apply_operations, parse_policy
from kdfast.data.stateless_random import IntArray, Purpose, hash64, uniform_below
from kdfast.data.views.normalization import Normalization
from kdfast.data.views.spec import ViewSpec
from kdfast.errors import ShapeError, UsageError
from kdfast.ops.views import check_images, crop_views, gather_views

# Third word of the hash that draws the shift before a policy; those of its operations count from 0.
_SHIFT = 1 << 16


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
        shifts = np.where(whole, spec.unshifted, uniform_below(hash64(keys, _SHIFT), spec.shifts))
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
