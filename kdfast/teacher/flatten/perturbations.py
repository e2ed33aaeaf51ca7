"""Where sharpness-aware SGD takes its gradient: the weights plus a perturbation.

To add one, write a class with the attributes of `Perturbation` and an entry in SHARPNESS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from kdfast.data.stateless_random import Purpose, hash64

Gradient: TypeAlias = Callable[[], Sequence[Tensor]]


class Perturbation(Protocol):
    """Interface of perturbations.

    Attributes:
        default_rho: Size of the perturbation if the caller gives none.
        passes: Forward and backward passes of a step, with the one behind the update.
        state: Tensors that later steps depend on, changed in place.
    """

    default_rho: float
    passes: int
    state: list[Tensor]

    def offsets(self, gradient: Gradient, step: int) -> list[Tensor]:
        """Return what to add to each weight in a step, without changing the weights; nothing: an empty list.

        Args:
            gradient: Computes the gradient of the step's batch at the weights.
            step: Number of steps done.
        """


class FriendlySAM:
    """F-SAM: along the part of the minibatch gradient that its running mean does not explain.

    With g the gradient of the batch and m <- decay m + (1 - decay) g, starting at zero, the offset is rho d / ||d||,
    where d = g - sigma m and the norm is over all weights together; it is zero if d is zero. Public code subtracts the
    mean before it includes g, and starts it at the first gradient: at sigma = 1 that d differs from this one by a
    positive factor, apart from the first steps.

    Args:
        weights: The weights.
        rho: Norm of the offset.
        seed: Not used.
        sigma: Share of the mean to subtract.
        decay: Decay of the mean, in [0, 1).

    Source:
        Li, Zhou, He, Cheng and Huang, Friendly Sharpness-Aware Minimization, CVPR 2024. The defaults are those of its
        public code.
    """

    default_rho = 0.05
    passes = 2

    def __init__(
        self, weights: Sequence[Tensor], rho: float, seed: int, *, sigma: float = 1.0, decay: float = 0.9
    ) -> None:
        self._rho, self._sigma, self._decay = rho, sigma, decay
        self.state = [torch.zeros_like(w) for w in weights]

    def offsets(self, gradient: Gradient, step: int) -> list[Tensor]:
        """Return the offset of each weight, and update the mean gradient."""
        found = []
        for g, mean in zip(gradient(), self.state, strict=True):
            mean.mul_(self._decay).add_(g, alpha=1 - self._decay)
            found.append(g - self._sigma * mean)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(d) for d in found]))
        scale = torch.where(norm > 0, self._rho / norm, 0.0)
        return [d * scale for d in found]


class FilterNoise:
    """LPF-SGD with one draw per step: Gaussian noise in proportion to the norm of each filter.

    The gradient at one such draw is an unbiased estimate of that of the loss smoothed by a Gaussian kernel. Every
    weight of a filter, a row along the first dimension, gets independent noise of standard deviation rho times the
    filter's norm; a bias or a norm layer's vector is one filter.

    Args:
        weights: The weights; the noise follows their current values.
        rho: Standard deviation relative to the norm.
        seed: Seed of the noise, which is a function of (seed, step).

    Source:
        Bisla, Wang and Choromanska, Low-Pass Filtering SGD for Recovering Flat Optima in the Deep Learning Optimization
        Landscape, AISTATS 2022; the default is that of its public code for CIFAR.
    """

    default_rho = 0.002
    passes = 1

    def __init__(self, weights: Sequence[Tensor], rho: float, seed: int) -> None:
        self._weights, self._rho, self._seed = weights, rho, seed
        self.state: list[Tensor] = []

    def offsets(self, gradient: Gradient, step: int) -> list[Tensor]:
        """Return the noise of each weight."""
        generator = torch.Generator(self._weights[0].device)
        generator.manual_seed(int(hash64(Purpose.FLATTEN, self._seed, step)[0]))
        return [self._noise(w.detach(), generator) for w in self._weights]

    def _noise(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        rest = tuple(range(1, weight.dim())) or None
        norms: Tensor = torch.linalg.vector_norm(weight, dim=rest, keepdim=rest is not None)
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
        return noise * (self._rho * norms)


class Unperturbed:
    """Plain SGD: no perturbation.

    Args:
        weights: Not used.
        rho: Not used.
        seed: Not used.
    """

    default_rho = 0.0
    passes = 1

    def __init__(self, weights: Sequence[Tensor], rho: float, seed: int) -> None:
        self.state: list[Tensor] = []

    def offsets(self, gradient: Gradient, step: int) -> list[Tensor]:
        """Return nothing."""
        return []


SHARPNESS: dict[str, type[FriendlySAM] | type[FilterNoise] | type[Unperturbed]] = {
    "fsam": FriendlySAM,
    "lpf": FilterNoise,
    "none": Unperturbed,
}
"""Name -> class of (weights, rho, seed) with the interface of `Perturbation`."""
