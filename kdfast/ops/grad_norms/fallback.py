"""Per-sample gradients of parameters without a formula, by ``torch.func.vmap`` or by a loop over the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdfast.errors import ShapeError, UsageError
from kdfast.ops.grad_norms.functionals import Functional
from kdfast.ops.grad_norms.recording.batch_axis import Batch, RngSnapshot
from kdfast.ops.grad_norms.reference import iter_chunks
from kdfast.ops.model_inputs import batched_tensors, call_model, replace_tensors

__all__ = ["FALLBACKS", "Fallback", "evaluate_by_loop", "evaluate_by_vmap"]

Fallback = Callable[[Batch, Mapping[str, nn.Parameter], Tensor, Functional], dict[str, Tensor]]


def evaluate_by_vmap(
    batch: Batch, parameters: Mapping[str, nn.Parameter], losses: Tensor, functional: Functional
) -> dict[str, Tensor]:
    """Evaluate a functional of the gradients of some parameters by running the whole model under vmap.

    Args:
        batch: Model, inputs and loss; active dropout is rejected, because its draws could not be repeated.
        parameters: Parameters of interest, by name.
        losses: The losses of the samples in the batch.
        functional: What to compute.

    Raises:
        UsageError: If the model cannot run under vmap, or the labels cannot be split.
        ShapeError: If a sample alone has another loss than in the batch.
    """
    batch.objective.require_sliceable_labels("fallback='vmap'")
    chosen = {name: p.detach() for name, p in parameters.items()}
    found = {name: functional.zeros(p, batch.n) for name, p in parameters.items()}
    sample_bytes = sum(p.numel() * p.element_size() for p in chosen.values())
    for rows, shared in _groups(batch):
        for chunk in iter_chunks(len(rows), sample_bytes):
            grads, values = _vmapped(batch, chosen, rows[chunk], shared)
            _check_losses(batch, values, rows[chunk], losses)
            for name, value in grads.items():
                functional.add(found[name], parameters[name], value, rows[chunk])
    return found


def _groups(batch: Batch) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield groups of samples with the same masks, and the keys of these masks.

    Models choose their attention by the values in a mask, which vmap does not allow; a mask that all samples share is
    not under vmap.
    """
    keys, tensors = batched_tensors(batch.inputs, batch.n, batch.dim)
    masks = [(key, x) for key, x in zip(keys[1:], tensors[1:], strict=True) if _is_mask(x)]
    everything = torch.arange(batch.n, device=tensors[0].device)
    if not masks:
        yield everything, []
        return
    flat = torch.cat([x.movedim(batch.dim, 0).reshape(batch.n, -1) for _, x in masks], 1)
    group = torch.unique(flat, dim=0, return_inverse=True)[1]
    for i in range(int(group.max()) + 1):
        yield everything[group == i], [key for key, _ in masks]


def _is_mask(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex() and bool(((x == 0) | (x == 1)).all())


def _vmapped(
    batch: Batch, chosen: dict[str, Tensor], rows: Tensor, shared: list[Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients and the losses of some samples that share the inputs at some keys."""
    fixed = {name: p.detach() for name, p in batch.model.named_parameters() if name not in chosen}
    keys, tensors = batched_tensors(batch.inputs, batch.n, batch.dim)
    own = [i for i, key in enumerate(keys) if key not in shared]
    common = {key: x.index_select(batch.dim, rows[:1]) for key, x in zip(keys, tensors, strict=True) if key in shared}

    def loss(params: dict[str, Tensor], samples: tuple[Tensor, ...], label: Any) -> Tensor:
        given = {keys[i]: x.unsqueeze(batch.dim) for i, x in zip(own, samples, strict=True)} | common
        sample = replace_tensors(batch.inputs, list(given), list(given.values()))
        objective = batch.objective.with_labels(None if label is None else label.unsqueeze(0))
        outputs = call_model(lambda *a, **k: functional_call(batch.model, {**fixed, **params}, a, k), sample)
        return objective(outputs).sum()

    labels = batch.objective.labels
    run = vmap(grad_and_value(loss), (None, batch.dim, None if labels is None else 0))
    samples = tuple(tensors[i].index_select(batch.dim, rows) for i in own)
    try:
        # Only the math kernel of scaled_dot_product_attention has a batching rule.
        with sdpa_kernel(SDPBackend.MATH):
            found: tuple[dict[str, Tensor], Tensor] = run(chosen, samples, None if labels is None else labels[rows])
    except Exception as error:  # a model may raise anything under vmap
        raise UsageError(
            f"fallback='vmap' for {', '.join(chosen)}: the model cannot run under torch.func.vmap ({error}); "
            "fallback='loop' runs one sample at a time instead; with dropout, call model.eval() for either"
        ) from error
    return found


def evaluate_by_loop(
    batch: Batch, parameters: Mapping[str, nn.Parameter], losses: Tensor, functional: Functional
) -> dict[str, Tensor]:
    """Compute the same by one forward and backward pass per sample: slow, for models that do not run under vmap.

    Args:
        batch: Model, inputs and loss.
        parameters: Parameters of interest, by name.
        losses: The losses of the samples in the batch.
        functional: What to compute.

    Raises:
        UsageError: If the model draws random numbers, which would score samples by different networks; if it cannot run
            on one sample; or if the labels cannot be split.
        ShapeError: If a sample alone has another loss than in the batch.
    """
    chosen = list(parameters.values())
    keys, tensors = batched_tensors(batch.inputs, batch.n, batch.dim)
    batch.objective.require_sliceable_labels("fallback='loop'")
    found = {name: functional.zeros(p, batch.n) for name, p in parameters.items()}
    rng = RngSnapshot(chosen[0].device)
    for i in range(batch.n):
        one = slice(i, i + 1)
        try:
            sample = replace_tensors(batch.inputs, keys, [x.narrow(batch.dim, i, 1) for x in tensors])
            loss = batch.objective.select(one)(call_model(batch.model, sample))
        except Exception as error:  # a model may raise anything on a single sample
            raise UsageError(
                f"fallback='loop': the model cannot run on one sample ({error}); every input with {batch.n} entries in "
                f"dimension {batch.dim} is split: check those that are not batched"
            ) from error
        if rng.changed():
            raise UsageError("fallback='loop': the model draws random numbers (dropout?): call model.eval() first")
        _check_losses(batch, loss, slice(i, i + 1), losses)
        grads = torch.autograd.grad(loss.sum(), chosen, allow_unused=True)
        for (name, p), value in zip(parameters.items(), grads, strict=True):
            if value is not None:
                functional.add(found[name], p, value.unsqueeze(0), one)
    return found


FALLBACKS: dict[str, Fallback] = {"vmap": evaluate_by_vmap, "loop": evaluate_by_loop}


def _check_losses(batch: Batch, found: Tensor, rows: Any, losses: Tensor) -> None:
    """Raise unless samples alone have the losses that they have in the batch.

    Raises:
        ShapeError: If they differ.
    """
    expected = losses[rows]
    if found.shape != expected.shape or not batch.same_losses(found, expected, losses.abs().max()):
        raise ShapeError(
            f"a sample alone has another loss than in the batch: if the samples are not in dimension {batch.dim} of "
            "the inputs, pass `batch_dim`; a model that mixes the samples has no gradient per sample"
        )
