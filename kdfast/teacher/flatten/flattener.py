"""Flattening in memory: weights, momentum and position, saved and restored after any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.data.order import batch_count, epoch_order
from kdfast.data.source import Split
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import ViewSpec, apply_views, draw_view_indices, view_table
from kdfast.errors import CheckpointError, DivergedError
from kdfast.nets.checkpoint import Model
from kdfast.ops.float32 import full_float32
from kdfast.teacher.flatten.config import FlattenConfig
from kdfast.teacher.flatten.perturbations import SHARPNESS


class Flattener:
    """Fine-tunes all weights of a network on the held-out part, step by step.

    The network is in evaluation mode: the statistics of batch norms stay as they are. The weights after any step depend
    on the arguments alone, not on interruptions.

    Args:
        model: The model, on the device; its network is changed in place.
        part: The held-out part.
        ids: int64 (n,), its samples in the training split, ascending.
        spec: The data's set of views.
        config: The settings.

    Attributes:
        step: Number of steps done.
        seconds: Time spent on them.
    """

    def __init__(self, model: Model, part: Split, ids: IntArray, spec: ViewSpec, config: FlattenConfig) -> None:
        self._net, self._normalization = model.net.eval().requires_grad_(True), model.normalization
        self._part, self._ids, self._spec, self._config = part, ids, spec, config
        names = dict(self._net.named_parameters())
        self._names, self._weights = list(names), list(names.values())
        self._velocities = [torch.zeros_like(w) for w in self._weights]
        self._perturbation = SHARPNESS[config.sharpness](self._weights, float(config.rho or 0), config.seed)
        self._device = self._weights[0].device
        self._views = config.views or spec.count
        self._table = view_table(spec, config.seed, ids, self._views)
        self._per_epoch = batch_count(len(ids), config.batch_size)
        self._epoch, self._order = -1, np.empty((2, 0), np.int64)
        self._losses: list[Tensor] = []
        self.step, self.seconds = 0, 0.0

    @full_float32()
    def take_step(self) -> None:
        """Take one step of SGD with the gradient at the perturbed weights."""
        inputs, labels = self._batch()
        loss = torch.zeros(())

        def gradient() -> tuple[Tensor, ...]:
            nonlocal loss
            with torch.enable_grad():
                loss = F.cross_entropy(self._net(inputs), labels)
            return torch.autograd.grad(loss, self._weights, allow_unused=True, materialize_grads=True)

        with torch.no_grad():
            offsets = self._perturbation.offsets(gradient, self.step)
            # Copies, because subtracting the offset again would round.
            kept = [w.clone() for w in self._weights] if offsets else []
            for weight, offset in zip(self._weights, offsets, strict=False):
                weight.add_(offset)
            gradients = gradient()
            for weight, value in zip(self._weights, kept, strict=False):
                weight.copy_(value)
            shrink = self._shrink(gradients)
            for weight, velocity, g in zip(self._weights, self._velocities, gradients, strict=True):
                velocity.mul_(self._config.momentum).add_(g * shrink)
                weight.sub_(velocity, alpha=self._config.lr)
        self._losses.append(loss.detach())
        self.step += 1

    def _shrink(self, gradients: Sequence[Tensor]) -> Tensor | float:
        """Return what scales the gradients to the largest norm that the settings allow, at most 1."""
        if not self._config.clip:
            return 1.0
        return (self._config.clip / torch.nn.utils.get_total_norm(gradients)).clamp(max=1.0)

    def take_loss(self) -> float:
        """Return the mean loss of the steps since the last call, at the perturbed weights.

        Raises:
            DivergedError: A loss or a weight is not finite.
        """
        loss = float(torch.stack(self._losses).mean())
        self._losses = []
        largest = torch.nn.utils.get_total_norm(self._weights, norm_type=float("inf"))
        if not (np.isfinite(loss) and bool(torch.isfinite(largest))):
            raise DivergedError(
                f"the loss or a weight is not finite after step {self.step} of {self._config.iterations}: lower `lr` "
                "or `rho`, or check the data and the teacher"
            )
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the remaining steps depend on, by name, on their device."""
        kinds: dict[str, Sequence[Tensor]] = {
            "weight": self._weights,
            "velocity": self._velocities,
            "sharpness": self._perturbation.state,
        }
        return {f"{kind}.{i}": x.detach() for kind, part in kinds.items() for i, x in enumerate(part)}

    def restore(self, step: int, seconds: float, tensors: Mapping[str, Tensor]) -> None:
        """Return to a saved state, before the first step.

        Raises:
            CheckpointError: The tensors are not those of this network, or the step is none of the settings.
        """
        if step > self._config.iterations:
            raise CheckpointError(
                f"the saved state is of step {step} of {self._config.iterations}: delete it to start over"
            )
        own = self.tensors()
        if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in tensors.items()}:
            raise CheckpointError("the saved state does not fit this network: delete it to start over")
        for name, x in own.items():
            x.copy_(tensors[name])
        self.step, self.seconds = step, seconds

    def images(self) -> int:
        """Return the number of images that went forward and backward in all steps of the settings."""
        epochs, rest = divmod(self._config.iterations, self._per_epoch)
        count = epochs * len(self._ids) + rest * self._config.batch_size
        return count * self._perturbation.passes

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Return the inputs (b, 3, h, w) and labels (b,) of the next step, on the device."""
        epoch, index = divmod(self.step, self._per_epoch)
        if epoch != self._epoch:
            order = epoch_order(self._ids, self._config.seed, epoch)
            rows = np.searchsorted(self._ids, order)
            drawn = draw_view_indices(self._config.seed, epoch, order, self._views)
            self._epoch, self._order = epoch, np.stack([rows, self._table[rows, drawn]])
        size = self._config.batch_size
        rows, views = self._order[:, index * size : (index + 1) * size]
        images = torch.from_numpy(self._part.read(rows)).to(self._device)
        labels = torch.from_numpy(self._part.labels[rows]).to(self._device)
        inputs = apply_views(images, views, self._spec, self._normalization, sample_ids=self._ids[rows])
        return inputs, labels
