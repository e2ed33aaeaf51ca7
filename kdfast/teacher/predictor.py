"""Fast inference on augmentation views: evaluation mode, folded batch norms, channels_last memory."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray
from kdfast.data.views import ViewSpec, apply_views
from kdfast.nets.checkpoint import Model
from kdfast.nets.head import forward_with_features
from kdfast.ops.float32 import full_float32
from kdfast.teacher.fold import fold_batch_norms

Precision = Literal["float32", "bfloat16"]

# Measured with ResNet-32 and ResNet-56 on 32x32 images: larger batches overflow the CPU's caches and halve the speed.
_CPU_BATCH = 192
_CUDA_BATCH = 1024


def default_batch_size(device: torch.device) -> int:
    """Return a number of images per forward pass that suits the device."""
    return _CPU_BATCH if device.type == "cpu" else _CUDA_BATCH


class Predictor:
    """Runs a model on views of raw images, normalized with the model's own statistics.

    Args:
        model: The model. It is copied, not changed.
        spec: The data's set of views.
        device: Where to compute.
        batch_size: Images per forward pass.
    """

    def __init__(self, model: Model, spec: ViewSpec, device: torch.device, batch_size: int) -> None:
        self.device = device
        self._batch_size = batch_size
        self._spec = spec
        self._normalization = model.normalization
        # Folded on the CPU, so that the bits do not depend on where the network was used before.
        self._net = fold_batch_norms(copy.deepcopy(model.net).eval().cpu()).to(device=device)
        self._net = self._net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    @full_float32()
    def predict_identity(
        self, images: Tensor, ids: IntArray, precision: Precision = "float32"
    ) -> tuple[Tensor, Tensor]:
        """Compute logits and features of the identity view of each image.

        Args:
            images: uint8 (n, H, W, 3), on the device.
            ids: Original sample indices (n,).
            precision: Arithmetic inside the network.

        Returns:
            Logits (n, C) and features (n, D), float32 on the CPU.
        """
        views = torch.full((len(ids),), self._spec.identity)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            parts = [
                forward_with_features(self._net, self._inputs(images[rows], views[rows], ids[rows]))
                for rows in self._slices(len(ids))
            ]
        logits, features = (torch.cat([part[side].float().cpu() for part in parts]) for side in (0, 1))
        return logits, features

    @torch.inference_mode()
    @full_float32()
    def predict_views(
        self, images: Tensor, view_ids: IntArray, ids: IntArray, precision: Precision, *, features: bool = False
    ) -> Tensor:
        """Compute logits, or features, of several views of each image.

        Args:
            images: uint8 (n, H, W, 3), on the device.
            view_ids: (n, V).
            ids: Original sample indices (n,).
            precision: Arithmetic inside the network.
            features: Whether to return the classifier's inputs instead of its outputs.

        Returns:
            float32 (n, V, C), or (n, V, D), on the CPU.
        """
        count, n_views = view_ids.shape
        flat = torch.from_numpy(view_ids.reshape(-1))
        row = torch.arange(count).repeat_interleave(n_views)
        row_on_device = row.to(self.device)
        parts = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for piece in self._slices(len(flat)):
                inputs = self._inputs(images[row_on_device[piece]], flat[piece], ids[row[piece].numpy()])
                outputs = forward_with_features(self._net, inputs)[1] if features else self._net(inputs)
                parts.append(outputs.float())
        return torch.cat(parts).cpu().reshape(count, n_views, -1)

    def _slices(self, count: int) -> list[slice]:
        return [slice(start, start + self._batch_size) for start in range(0, count, self._batch_size)]

    def _inputs(self, images: Tensor, view_ids: Tensor, ids: IntArray) -> Tensor:
        return apply_views(images, view_ids, self._spec, self._normalization, sample_ids=ids)
