"""Shifted views: a window of the zero-padded image, mirrored or not, normalized to floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops._torch_compat import is_plain_eager
from kdfast.ops.views.checks import check_affine, check_images, check_indices, normalize, resolve_views


def gather_views(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    *,
    pad: int,
    flip: bool,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Zero-pad the image of each sample, crop a window of the original size, optionally mirror it, and normalize.

    A view id is `(top * (2 pad + 1) + left) * flips + mirrored`, with `top` and `left` in `[0, 2 pad]` and with 2
    `flips` if `flip` is true, else 1. With `P` the image padded by `pad` black pixels on each side,
    `out[i, c, y, x] = P[top + y, left + x', c] * scale[c] + bias[c]`, where `x'` is `W - 1 - x` if mirrored and `x`
    otherwise. Each of the two operations is rounded, then the result is rounded to `dtype`. All implementations are
    bit-equal.

    On a GPU nothing is copied to the host or waited for. There a row or view id out of range cannot raise an error:
    the sample becomes NaN.

    Args:
        images: `(N, H, W, 3)` uint8, contiguous, on any device: a batch, or the data set that `rows` selects from.
        rows: `(B,)` int64 on the images' device: the image of each sample, in `[0, N)`. None: sample i has image i,
            and B = N.
        view_ids: `(B,)` int64 on the images' device.
        affine: `(2, 3)` on the images' device: scale and bias of each channel, in float32 or float64, which is the
            precision of the computation.
        pad: Width of the black border, in pixels.
        flip: Whether the views include mirrored ones.
        dtype: Floating-point dtype of the result.
        backend: "auto", or the name of an implementation in the row "views" of `kdfast.ops.backends`.

    Returns:
        `(B, 3, H, W)` in `dtype` and channels_last memory format, on the device of the images.

    Raises:
        DataError: If the images are not uint8.
        ShapeError: If another shape, dtype or device is not as above, or a row or view id is out of range on a CPU.
        BackendUnavailable: If a named implementation cannot run here.
    """
    if not torch.compiler.is_compiling() and is_plain_eager((images, rows, view_ids, affine)):
        return _run(images, rows, view_ids, affine, pad, flip, dtype, backend)
    out: Tensor = _gather_views(images, rows, view_ids, affine, pad, flip, dtype, backend)
    return out


@torch.library.custom_op("kdfast::gather_views", mutates_args=())
def _gather_views(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    pad: int,
    flip: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _run(images, rows, view_ids, affine, pad, flip, dtype, backend)


@_gather_views.register_fake
def _(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    pad: int,
    flip: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return images.new_empty((len(view_ids), *images.shape[1:]), dtype=dtype).permute(0, 3, 1, 2)


def _run(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    pad: int,
    flip: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    check_images(images)
    check_affine(affine, images, dtype)
    batch = images if rows is None else rows
    check_indices(view_ids, "view_ids", (len(batch),), images.device, _view_count(pad, flip))
    if rows is not None:
        check_indices(rows, "rows", (rows.numel(),), images.device, len(images))
    name = resolve_views(images, affine, dtype, backend)
    # Deferred: the compiled extension or Triton may be missing.
    if name == "native":
        from kdfast.ops import native

        return native.gather_views(images, rows, view_ids, affine, pad, flip, dtype)
    if name == "triton":
        from kdfast.ops.views import gather_triton

        return gather_triton.gather_views(images, rows, view_ids, affine, pad, flip, dtype)
    return gather_views_reference(images, rows, view_ids, affine, pad=pad, flip=flip, dtype=dtype)


def gather_views_reference(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    *,
    pad: int,
    flip: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `gather_views` in plain PyTorch, without checks."""
    count, height, width = images.shape[:3]
    device, flips, side = images.device, 2 if flip else 1, 2 * pad + 1
    if rows is None:
        rows = torch.arange(len(view_ids), device=device)
    bad = (rows < 0) | (rows >= count) | (view_ids < 0) | (view_ids >= _view_count(pad, flip))
    rows, view_ids = rows.masked_fill(bad, 0), view_ids.masked_fill(bad, 0)
    shifts, mirrored = view_ids // flips, view_ids % flips == 1
    x = torch.arange(width, device=device)
    x = torch.where(mirrored[:, None], width - 1 - x, x) + (shifts % side - pad)[:, None]  # (B, W)
    y = torch.arange(height, device=device) + (shifts // side - pad)[:, None]  # (B, H)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    pixels = images[rows[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]  # (B, H, W, 3)
    values = normalize(pixels, affine).to(dtype)
    return values.masked_fill_(bad[:, None, None, None], torch.nan)


def _view_count(pad: int, flip: bool) -> int:
    return (2 * pad + 1) ** 2 * (2 if flip else 1)
