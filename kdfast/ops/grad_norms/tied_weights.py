"""Parameters that may be used more than once: the gradients of all uses are added before they are squared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdfast.ops.grad_norms.factors import DenseGrad, Embedding, GradFactors, OuterProduct
from kdfast.ops.grad_norms.operations.recompute import NotSeparable
from kdfast.ops.grad_norms.recording.capture import Call
from kdfast.ops.grad_norms.reference import iter_chunks, iter_materialized

__all__ = ["FactorCollector", "merge_uses", "squared_norms_of_sum"]


class FactorCollector:
    """Collects gradient factors and evaluates each parameter's as soon as those of its last use have arrived.

    Args:
        parameters: The parameters of interest, by id.
        calls: All recorded calls whose output gradients will arrive.
        evaluate: Called with a parameter and the factors of its uses.

    Attributes:
        values: What ``evaluate`` returned for the parameters completed so far, by id.
        failed: For the ids of parameters whose samples could not be separated, the reason.
    """

    def __init__(
        self,
        parameters: Mapping[int, nn.Parameter],
        calls: Sequence[Call],
        evaluate: Callable[[nn.Parameter, Sequence[GradFactors]], Tensor],
    ) -> None:
        self.values: dict[int, Tensor] = {}
        self.failed: dict[int, NotSeparable] = {}
        self._parameters = parameters
        self._evaluate = evaluate
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
        device = uses[0].b.device.type
        try:
            with torch.autocast(device, enabled=False):
                self.values[key] = self._evaluate(self._parameters[key], uses)
        except NotSeparable as error:
            self.failed[key] = error


def squared_norms_of_sum(
    uses: Sequence[GradFactors],
    shape: Sequence[int],
    squared_norms: Callable[[GradFactors], Tensor],
    weights: Tensor | None = None,
) -> Tensor:
    """Compute the squared norm of the sum of a parameter's gradients, `(N,)`.

    Args:
        uses: Gradient factors of all uses of the parameter.
        shape: Shape of the parameter.
        squared_norms: Computes the squared norms of one use.
        weights: Factors of the squares that ``squared_norms`` applies; None for 1.
    """
    merged = merge_uses(uses)
    if len(merged) == 1:
        return squared_norms(merged[0])
    tied = {type(factors): factors for factors in merged}
    if len(merged) == 2 and set(tied) == {OuterProduct, Embedding}:
        output, embedding = tied[OuterProduct], tied[Embedding]
        assert isinstance(output, OuterProduct)
        assert isinstance(embedding, Embedding)
        inner = _inner_product(output, embedding, weights)
        return (squared_norms(output) + squared_norms(embedding) + 2 * inner).clamp_min_(0)
    out = merged[0].b.new_empty(len(merged[0].b))
    for chunk, total in iter_materialized(merged, shape):
        squares = total.reshape(len(total), -1).square()
        out[chunk] = (squares if weights is None else squares.mul_(weights.flatten())).sum(1)
    return out


def merge_uses(uses: Sequence[GradFactors]) -> list[GradFactors]:
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


def _inner_product(output: OuterProduct, embedding: Embedding, weights: Tensor | None) -> Tensor:
    """Compute `<sum_s g_s h_s^T, sum_t e_{id_t} b_t^T> = sum_{s,t} g_s[id_t] (h_s . b_t)` of each sample.

    With weights of the elements, `b_t` is multiplied by their row `id_t`.
    """
    n, s = output.b.shape[:2]
    t = embedding.ids.shape[1]
    out = output.b.new_empty(n)
    for chunk in iter_chunks(n, 2 * s * t * output.b.element_size()):
        ids = embedding.ids[chunk].unsqueeze(1).expand(-1, s, t)
        picked = torch.gather(output.b[chunk], 2, ids)
        if embedding.padding_idx is not None:
            picked = picked * (ids != embedding.padding_idx)
        b = embedding.b[chunk] if weights is None else embedding.b[chunk] * weights[embedding.ids[chunk]]
        out[chunk] = (picked * torch.bmm(output.a[chunk], b.transpose(1, 2))).sum((1, 2))
    return out
