"""Per-sample gradients of parameters without a formula, by ``torch.func.vmap`` or by a loop over the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.objective import Objective, batched_tensors, call_model, replace_tensors
from kdfast.ops.grad_norms.reference import iter_chunks

__all__ = ["FALLBACKS", "Fallback", "RngSnapshot", "squared_norms_loop", "squared_norms_vmap"]

Fallback = Callable[[nn.Module, Any, Objective, Mapping[str, nn.Parameter], int], dict[str, Tensor]]


def squared_norms_vmap(
    model: nn.Module, inputs: Any, objective: Objective, parameters: Mapping[str, nn.Parameter], n: int
) -> dict[str, Tensor]:
    """Compute squared norms `(N,)` of the gradients of some parameters by running the whole model under vmap.

    Args:
        model: The model; active dropout is rejected, because its draws could not be repeated.
        inputs: As for ``grad_norms``; tensors whose first dimension is `n` are split into samples.
        objective: Loss of the whole batch.
        parameters: Parameters of interest, by name.
        n: Number of samples in the batch.

    Raises:
        UsageError: If the model cannot run under vmap, or the labels cannot be split.
    """
    chosen = {name: p.detach() for name, p in parameters.items()}
    fixed = {name: p.detach() for name, p in model.named_parameters() if name not in chosen}
    names, batched = batched_tensors(inputs, n)
    objective.require_sliceable_labels("fallback='vmap'")

    def loss(params: dict[str, Tensor], tensors: tuple[Tensor, ...], label: Any) -> Tensor:
        sample = replace_tensors(inputs, names, [x.unsqueeze(0) for x in tensors])
        sample_objective = objective.with_targets(None if label is None else label.unsqueeze(0), None)
        outputs = call_model(lambda *a, **k: functional_call(model, {**fixed, **params}, a, k), sample)
        return sample_objective(outputs).sum()

    per_sample = vmap(grad(loss), (None, 0, None if objective.labels is None else 0))
    sample_bytes = sum(p.numel() * p.element_size() for p in chosen.values())
    found = _allocate_norms(parameters, n)
    for chunk in iter_chunks(n, sample_bytes):
        label = None if objective.labels is None else objective.labels[chunk]
        try:
            # Only the math kernel of scaled_dot_product_attention has a batching rule.
            with sdpa_kernel(SDPBackend.MATH):
                grads = per_sample(chosen, tuple(x[chunk] for x in batched), label)
        except RuntimeError as error:
            raise UsageError(
                f"fallback='vmap' for {', '.join(chosen)}: the model cannot run under torch.func.vmap ({error}); "
                "fallback='loop' runs one sample at a time instead; with dropout, call model.eval() for either"
            ) from error
        for name, value in grads.items():
            found[name][chunk] = value.flatten(1).to(found[name].dtype).square().sum(1)
    return found


def squared_norms_loop(
    model: nn.Module, inputs: Any, objective: Objective, parameters: Mapping[str, nn.Parameter], n: int
) -> dict[str, Tensor]:
    """Compute the same by one forward and backward pass per sample: slow, for models that do not run under vmap.

    Args:
        model: The model.
        inputs: As for ``squared_norms_vmap``.
        objective: Loss of the whole batch.
        parameters: Parameters of interest, by name.
        n: Number of samples in the batch.

    Raises:
        UsageError: If the model draws random numbers, which would score samples by different networks; if it cannot run
            on one sample; or if the labels cannot be split.
    """
    chosen = list(parameters.values())
    names, batched = batched_tensors(inputs, n)
    objective.require_sliceable_labels("fallback='loop'")
    found = _allocate_norms(parameters, n)
    rng = RngSnapshot(chosen[0].device)
    for i in range(n):
        one = slice(i, i + 1)
        try:
            sample = replace_tensors(inputs, names, [x[one] for x in batched])
            loss = objective.select(one)(call_model(model, sample)).sum()
        except RuntimeError as error:
            raise UsageError(
                f"fallback='loop': the model cannot run on one sample ({error}); every input as long as the batch is "
                "split: check those that are not batched"
            ) from error
        if rng.changed():
            raise UsageError("fallback='loop': the model draws random numbers (dropout?): call model.eval() first")
        grads = torch.autograd.grad(loss, chosen, allow_unused=True)
        for name, value in zip(parameters, grads, strict=True):
            found[name][i] = 0 if value is None else value.to(found[name].dtype).square().sum()
    return found


FALLBACKS: dict[str, Fallback] = {"vmap": squared_norms_vmap, "loop": squared_norms_loop}


def _allocate_norms(parameters: Mapping[str, nn.Parameter], n: int) -> dict[str, Tensor]:
    """Allocate `(n,)` for each parameter, in float32 or the parameter's wider dtype."""
    return {name: p.new_empty(n, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()}


class RngSnapshot:
    """State of a device's random number generator at construction."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._state = self._current()

    def changed(self) -> bool:
        """Return whether random numbers were drawn since."""
        return not torch.equal(self._state, self._current())

    def restore(self) -> None:
        """Reset the generator to the snapshot."""
        if self._cuda is None:
            torch.set_rng_state(self._state)
        else:
            torch.cuda.set_rng_state(self._state, self._cuda)

    def _current(self) -> Tensor:
        return torch.get_rng_state() if self._cuda is None else torch.cuda.get_rng_state(self._cuda)
