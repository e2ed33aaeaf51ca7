"""Squared norms of parameters that may be used more than once: their gradients are summed before they are squared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdfast.errors import UsageError
from kdfast.ops.grad_norms.capture import Call
from kdfast.ops.grad_norms.factors import DenseGrad, Embedding, GradFactors, OuterProduct
from kdfast.ops.grad_norms.layers import find_formula, trainable_parameters
from kdfast.ops.grad_norms.reference import iter_chunks, materialize

__all__ = ["SquaredNormAccumulator", "SquaredNorms", "squared_norms_of_sum"]

SquaredNorms = Callable[[GradFactors], Tensor]


class SquaredNormAccumulator:
    """Collects gradient factors and squares each parameter's as soon as those of its last use have arrived.

    Args:
        parameters: The parameters of interest, by id.
        calls: All recorded calls whose output gradients will arrive.
        squared_norms: Computes the squared norms of one use.

    Attributes:
        squares: Squared norms `(N,)` of the parameters completed so far, by id.
    """

    def __init__(
        self, parameters: Mapping[int, nn.Parameter], calls: Sequence[Call], squared_norms: SquaredNorms
    ) -> None:
        self.squares: dict[int, Tensor] = {}
        self._parameters = parameters
        self._squared_norms = squared_norms
        self._uses: dict[int, list[GradFactors]] = {}
        self._pending = Counter(id(p) for call in calls for p in trainable_parameters(call.layer).values())

    def receive(self, call: Call, grad: Tensor) -> None:
        """Add the factors of one call, given its output gradient."""
        formula = find_formula(call.layer)
        assert formula is not None
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            x = call.take_input()
            if grad.dtype in (torch.float16, torch.bfloat16):
                grad = grad.float()
            try:
                factors = formula(call.layer, x.to(grad.dtype) if x.is_floating_point() else x, grad)
            except UsageError as error:
                raise UsageError(f"layer {call.name!r}: {error}") from None
            for name, p in trainable_parameters(call.layer).items():
                if id(p) in self._parameters:
                    self._uses.setdefault(id(p), []).append(factors[name]())
                    self._pending[id(p)] -= 1
                    if not self._pending[id(p)]:
                        self._complete(id(p))

    def finish(self) -> None:
        """Complete the parameters with uses that the loss does not depend on."""
        with torch.no_grad():
            for key in list(self._uses):
                self._complete(key)

    def _complete(self, key: int) -> None:
        uses = self._uses.pop(key)
        if len(uses) == 1:
            self.squares[key] = self._squared_norms(uses[0])
        else:
            self.squares[key] = squared_norms_of_sum(uses, self._parameters[key].shape, self._squared_norms)


def squared_norms_of_sum(uses: Sequence[GradFactors], shape: Sequence[int], squared_norms: SquaredNorms) -> Tensor:
    """Compute the squared norm of the sum of a parameter's gradients, `(N,)`.

    Args:
        uses: Gradient factors of all uses of the parameter.
        shape: Shape of the parameter.
        squared_norms: Computes the squared norms of one use.
    """
    merged = _merge(uses)
    if len(merged) == 1:
        return squared_norms(merged[0])
    tied = {type(factors): factors for factors in merged}
    if len(merged) == 2 and set(tied) == {OuterProduct, Embedding}:
        output, embedding = tied[OuterProduct], tied[Embedding]
        assert isinstance(output, OuterProduct)
        assert isinstance(embedding, Embedding)
        inner = _inner_product(output, embedding)
        return (squared_norms(output) + squared_norms(embedding) + 2 * inner).clamp_min_(0)
    first = merged[0].grad if isinstance(merged[0], DenseGrad) else merged[0].b
    out = first.new_empty(len(first))
    sample_bytes = torch.Size(shape).numel() * first.element_size() * len(merged)
    for chunk in iter_chunks(len(first), sample_bytes):
        total = sum((materialize(use, shape, chunk) for use in merged[1:]), materialize(merged[0], shape, chunk))
        out[chunk] = total.flatten(1).square().sum(1)
    return out


def _merge(uses: Sequence[GradFactors]) -> list[GradFactors]:
    """Merge factors of one type where that is cheap: add dense gradients, concatenate positions of the others."""
    dense = [use for use in uses if isinstance(use, DenseGrad)]
    products = [use for use in uses if isinstance(use, OuterProduct)]
    embeddings = [use for use in uses if isinstance(use, Embedding)]
    merged: list[GradFactors] = [use for use in uses if not isinstance(use, (DenseGrad, OuterProduct, Embedding))]
    if dense:
        merged.append(DenseGrad(torch.stack([use.grad for use in dense]).sum(0)))
    if products:
        merged.append(
            OuterProduct(torch.cat([use.a for use in products], 1), torch.cat([use.b for use in products], 1))
        )
    if len({use.padding_idx for use in embeddings}) == 1:
        ids, b = torch.cat([use.ids for use in embeddings], 1), torch.cat([use.b for use in embeddings], 1)
        merged.append(Embedding(ids, b, embeddings[0].num_embeddings, embeddings[0].padding_idx))
    else:
        merged += embeddings
    return merged


def _inner_product(output: OuterProduct, embedding: Embedding) -> Tensor:
    """Compute `<sum_s g_s h_s^T, sum_t e_{id_t} b_t^T> = sum_{s,t} g_s[id_t] (h_s . b_t)` of each sample."""
    n, s = output.b.shape[:2]
    t = embedding.ids.shape[1]
    out = output.b.new_empty(n)
    for chunk in iter_chunks(n, 2 * s * t * output.b.element_size()):
        ids = embedding.ids[chunk].unsqueeze(1).expand(-1, s, t)
        picked = torch.gather(output.b[chunk], 2, ids)
        if embedding.padding_idx is not None:
            picked = picked * (ids != embedding.padding_idx)
        out[chunk] = (picked * torch.bmm(output.a[chunk], embedding.b[chunk].transpose(1, 2))).sum((1, 2))
    return out
