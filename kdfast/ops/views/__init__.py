"""Augmentation as a gather: shift or crop uint8 images, mirror them, and normalize them to floating point."""

from kdfast.ops.views.checks import check_images
from kdfast.ops.views.crops import crop_views, crop_views_reference
from kdfast.ops.views.gather import gather_views, gather_views_reference

__all__ = ["check_images", "crop_views", "crop_views_reference", "gather_views", "gather_views_reference"]
