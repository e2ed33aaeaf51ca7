"""Norms of parameters that are used more than once: gradients are summed before they are squared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdfast.ops.grad_norms.factors import Lookup, Part, Rows, Small
from kdfast.ops.grad_norms.reference import chunks, materialise

__all__ = ["squares_of_sum"]


def squares_of_sum(parts: Sequence[Part], shape: Sequence[int], squares: Callable[[Part], Tensor]) -> Tensor:
    """`||sum of the parts||^2` of each sample, `(N,)`.

    Args:
        parts: All uses of one parameter.
        shape: Of the parameter.
        squares: The norm of one part.
    """
    merged = _merged(parts)
    if len(merged) == 1:
        return squares(merged[0])
    tied = {type(part): part for part in merged}
    if len(merged) == 2 and set(tied) == {Rows, Lookup}:
        rows, lookup = tied[Rows], tied[Lookup]
        assert isinstance(rows, Rows)
        assert isinstance(lookup, Lookup)
        return (squares(rows) + squares(lookup) + 2 * _inner(rows, lookup)).clamp_min_(0)
    n, first = _samples(merged[0])
    out = first.new_empty(n)
    size = torch.Size(shape).numel() * first.element_size() * len(merged)
    for chunk in chunks(n, size):
        total = sum((materialise(part, shape, chunk) for part in merged[1:]), materialise(merged[0], shape, chunk))
        out[chunk] = total.flatten(1).square().sum(1)
    return out


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Parts of one kind joined where that is cheap: small ones added, rows and lookups put end to end."""
    small = [part for part in parts if isinstance(part, Small)]
    rows = [part for part in parts if isinstance(part, Rows)]
    lookups = [part for part in parts if isinstance(part, Lookup)]
    found: list[Part] = [part for part in parts if not isinstance(part, (Small, Rows, Lookup))]
    if small:
        found.append(Small(torch.stack([part.grad for part in small]).sum(0)))
    if rows:
        found.append(Rows(torch.cat([part.a for part in rows], 1), torch.cat([part.b for part in rows], 1)))
    if len({part.skipped for part in lookups}) == 1:
        ids, b = torch.cat([part.ids for part in lookups], 1), torch.cat([part.b for part in lookups], 1)
        found.append(Lookup(ids, b, lookups[0].rows, lookups[0].skipped))
    else:
        found += lookups
    return found


def _inner(rows: Rows, lookup: Lookup) -> Tensor:
    """`<sum_s g_s h_s^T, sum_t e_{id_t} b_t^T>` = `sum_{s,t} g_s[id_t] (h_s . b_t)`, of each sample."""
    n, s = rows.b.shape[:2]
    t = lookup.ids.shape[1]
    out = rows.b.new_empty(n)
    for chunk in chunks(n, 2 * s * t * rows.b.element_size()):
        ids = lookup.ids[chunk].unsqueeze(1).expand(-1, s, t)
        picked = torch.gather(rows.b[chunk], 2, ids)
        if lookup.skipped is not None:
            picked = picked * (ids != lookup.skipped)
        out[chunk] = (picked * torch.bmm(rows.a[chunk], lookup.b[chunk].transpose(1, 2))).sum((1, 2))
    return out


def _samples(part: Part) -> tuple[int, Tensor]:
    first = part.grad if isinstance(part, Small) else part.b
    return len(first), first
