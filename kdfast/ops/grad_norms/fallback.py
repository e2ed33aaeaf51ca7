"""Per-sample gradients of parameters without a formula: under ``torch.func.vmap``, or in a loop over the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.objective import Objective, joined, run, split
from kdfast.ops.grad_norms.reference import chunks

__all__ = ["FALLBACKS", "RandomState", "loop_squares", "vmap_squares"]

Squares = Callable[[nn.Module, Any, Objective, Mapping[str, nn.Parameter], int], dict[str, Tensor]]


def vmap_squares(
    model: nn.Module, inputs: Any, objective: Objective, parameters: Mapping[str, nn.Parameter], n: int
) -> dict[str, Tensor]:
    """Squared norms `(N,)` of the gradients of some parameters, from the whole model run under vmap.

    Args:
        model: As it is; dropout that is on cannot be repeated and is refused.
        inputs: As for ``grad_norms``; tensors whose first dimension is `n` are split into samples.
        objective: The loss of the whole batch.
        parameters: Which ones, by name.
        n: Samples in the batch.

    Raises:
        UsageError: The model cannot run under vmap.
    """
    chosen = {name: p.detach() for name, p in parameters.items()}
    fixed = {name: p.detach() for name, p in model.named_parameters() if name not in chosen}
    names, batched = split(inputs, n)
    objective.require_rows("fallback='vmap'")

    def loss(params: dict[str, Tensor], tensors: tuple[Tensor, ...], label: Any) -> Tensor:
        sample = joined(inputs, names, [x.unsqueeze(0) for x in tensors])
        part = objective.of(None if label is None else label.unsqueeze(0), None)
        outputs = run(lambda *a, **k: functional_call(model, {**fixed, **params}, a, k), sample)
        return part(outputs).sum()

    per_sample = vmap(grad(loss), (None, 0, None if objective.labels is None else 0))
    size = sum(p.numel() * p.element_size() for p in chosen.values())
    found = _room(parameters, n)
    for chunk in chunks(n, size):
        label = None if objective.labels is None else objective.labels[chunk]
        try:
            # Other kernels of scaled_dot_product_attention have no batching rule.
            with sdpa_kernel(SDPBackend.MATH):
                grads = per_sample(chosen, tuple(x[chunk] for x in batched), label)
        except RuntimeError as error:
            raise UsageError(
                f"fallback='vmap' for {', '.join(chosen)}: the model cannot run under torch.func.vmap ({error}); "
                "fallback='loop' does without, one sample after the other; dropout needs model.eval() in both"
            ) from error
        for name, value in grads.items():
            found[name][chunk] = value.flatten(1).to(found[name].dtype).square().sum(1)
    return found


def loop_squares(
    model: nn.Module, inputs: Any, objective: Objective, parameters: Mapping[str, nn.Parameter], n: int
) -> dict[str, Tensor]:
    """The same by a forward and a backward pass for each sample: slow, for models that do not run under vmap.

    Args:
        model: As it is.
        inputs: As for ``vmap_squares``.
        objective: The loss of the whole batch.
        parameters: Which ones, by name.
        n: Samples in the batch.

    Raises:
        UsageError: The model draws random numbers, so that samples would be scored by different networks.
    """
    chosen = list(parameters.values())
    names, batched = split(inputs, n)
    objective.require_rows("fallback='loop'")
    found = _room(parameters, n)
    random = RandomState(chosen[0].device)
    for i in range(n):
        one = slice(i, i + 1)
        try:
            loss = objective.rows(one)(run(model, joined(inputs, names, [x[one] for x in batched]))).sum()
        except RuntimeError as error:
            raise UsageError(
                f"fallback='loop': the model cannot run on one sample ({error}); inputs as long as the batch are split"
            ) from error
        if random.changed():
            raise UsageError("fallback='loop': the model draws random numbers (dropout?): call model.eval() first")
        grads = torch.autograd.grad(loss, chosen, allow_unused=True)
        for name, value in zip(parameters, grads, strict=True):
            found[name][i] = 0 if value is None else value.to(found[name].dtype).square().sum()
    return found


FALLBACKS: dict[str, Squares] = {"vmap": vmap_squares, "loop": loop_squares}


def _room(parameters: Mapping[str, nn.Parameter], n: int) -> dict[str, Tensor]:
    """A float32 or wider number a sample for each parameter."""
    return {name: p.new_empty(n, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()}


class RandomState:
    """The state of a device's random numbers at the time when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._state = self._now()

    def changed(self) -> bool:
        """Whether numbers were drawn since."""
        return not torch.equal(self._state, self._now())

    def restore(self) -> None:
        """Go back to it."""
        if self._cuda is None:
            torch.set_rng_state(self._state)
        else:
            torch.cuda.set_rng_state(self._state, self._cuda)

    def _now(self) -> Tensor:
        return torch.get_rng_state() if self._cuda is None else torch.cuda.get_rng_state(self._cuda)
