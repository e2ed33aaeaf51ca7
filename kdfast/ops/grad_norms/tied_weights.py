"""Squared norms of parameters that may be used more than once: their gradients are summed before they are squared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdfast.ops.grad_norms.factors import DenseGrad, Embedding, GradFactors, OuterProduct
from kdfast.ops.grad_norms.operations.recompute import NotSeparable
from kdfast.ops.grad_norms.recording.capture import Call
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
        failed: For the ids of parameters whose samples could not be separated, the reason.
    """

    def __init__(
        self, parameters: Mapping[int, nn.Parameter], calls: Sequence[Call], squared_norms: SquaredNorms
    ) -> None:
        self.squares: dict[int, Tensor] = {}
        self.failed: dict[int, NotSeparable] = {}
        self._parameters = parameters
        self._squared_norms = squared_norms
        self._uses: dict[int, list[GradFactors]] = {}
        self._pending = Counter(id(p) for call in calls for p in call.parameters())

    def receive(self, call: Call) -> None:
        """Add the factors of one call."""
        grad = next(iter(call.grads.values()))
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            for p, factors in call.contributions():
                if id(p) in self._parameters:
                    try:
                        self._uses.setdefault(id(p), []).append(factors())
                    except NotSeparable as error:
                        self.failed[id(p)] = error
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
        if key in self.failed:
            return
        try:
            if len(uses) == 1:
                self.squares[key] = self._squared_norms(uses[0])
            else:
                self.squares[key] = squared_norms_of_sum(uses, self._parameters[key].shape, self._squared_norms)
        except NotSeparable as error:
            self.failed[key] = error


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
    first = merged[0].b
    out = first.new_empty(len(first))
    sample_bytes = torch.Size(shape).numel() * first.element_size() * len(merged)
    for chunk in iter_chunks(len(first), sample_bytes):
        total = sum((materialize(use, shape, chunk) for use in merged[1:]), materialize(merged[0], shape, chunk))
        out[chunk] = total.reshape(len(total), -1).square().sum(1)
    return out


def _merge(uses: Sequence[GradFactors]) -> list[GradFactors]:
    """Merge factors of one type where that is cheap: add dense gradients, concatenate positions of the others."""
    dense = [use for use in uses if isinstance(use, DenseGrad)]
    products = [use for use in uses if isinstance(use, OuterProduct)]
    embeddings = [use for use in uses if isinstance(use, Embedding)]
    merged: list[GradFactors] = [use for use in uses if not isinstance(use, (DenseGrad, OuterProduct, Embedding))]
    if dense:
        merged.append(DenseGrad(torch.stack([use.b for use in dense]).sum(0)))
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
