"""Augmentation as a finite, seeded set of views, so that a teacher's logits on each can be cached.

A view is one outcome of the augmentation, named by a view id: for 32x32 images zero-pad 4 + crop + flip has
9 * 9 * 2 = 162 views, and for large images each sample has a fixed number of random resized crops. A run may use fewer
views per sample (`n_views`); the view index, 0 to n_views - 1, is the position among them. The views of a sample and
their order are hashes of (seed, sample, epoch): the same on any machine, rank, batch split and loader.
"""

from __future__ import annotations

from kdfast.data.views.apply import apply_views, view_boxes
from kdfast.data.views.draws import draw_view_indices, view_table
from kdfast.data.views.normalization import Normalization
from kdfast.data.views.spec import ViewSpec

__all__ = ["Normalization", "ViewSpec", "apply_views", "draw_view_indices", "view_boxes", "view_table"]
