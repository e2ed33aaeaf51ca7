"""Top-k teachers from what other programs store: log-probabilities of the most probable classes, or drawn classes.

Inference servers return the log-probabilities of the k most probable tokens, at temperature 1. The mass of all other
classes follows from them at that temperature; at another one, it also depends on how the mass is spread, which
`tempered_tail` bounds and estimates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.kd_loss.call import TopKTeacher
from kdfast.ops.kd_loss.validation import as_float, as_int, check_temperature

__all__ = ["Tail", "from_logprobs", "from_samples", "pad_rows", "rank_bound", "tempered_tail"]

SMALLEST_REST = 2.0**-24
"""Mass of the other classes where rounding leaves none: half of the spacing of float32 at 1."""

_BLOCK_ROWS = 1 << 15
_SUMMED = 16  # terms of the power law that are summed one by one; an integral stands for the rest
_BISECTIONS = 50


class Tail(NamedTuple):
    """Log of the sum of p^(1/T) over the classes left out, float64 (M,): an estimate, and the least and largest value.

    Both bounds are attained by distributions that agree with what is known.
    """

    estimate: Tensor
    low: Tensor
    high: Tensor


def from_logprobs(
    values: Any,
    ids: Any,
    temperature: float,
    *,
    classes: int | None,
    offsets: Any | None,
    top_k: int | None,
    logprob_temperature: float,
    tail: bool,
) -> TopKTeacher:
    """Compute `TopKTeacher.from_logprobs`."""
    temperature, stored_at = as_float("temperature", temperature), as_float("logprob_temperature", logprob_temperature)
    check_temperature(temperature)
    check_temperature(stored_at, name="`logprob_temperature`")
    values, ids = torch.as_tensor(values), torch.as_tensor(ids)
    if offsets is not None:
        values, ids = pad_rows(values, ids, torch.as_tensor(offsets))
    classes = None if classes is None else as_int("classes", classes)
    ids, kept = _check_entries(values, ids, classes)
    if top_k is not None and as_int("top_k", top_k) < 0:
        raise ShapeError(f"`top_k` is {top_k}: pass the number of most probable classes in each row, 0 if not known")
    kept = kept & ~_is_repeated(ids, kept)
    values = torch.where(kept, values, -torch.inf)
    found = kept.any(1)
    if tail and temperature == stored_at:
        rest = log_rest(values, classes).float()
    elif tail:
        if classes is None:
            raise ShapeError(
                f"`temperature` is {temperature:g} and the log-probabilities are at {stored_at:g}, so the mass of the "
                "other classes depends on their number: pass `classes`, the size of the vocabulary"
            )
        rest = _tempered_rest(values, classes, top_k, stored_at / temperature)
    else:
        rest = torch.where(found, -torch.inf, 0.0)  # a row without entries has one outcome, and no divergence
    kept_values = values if stored_at == 1 else values * stored_at
    dtype = torch.float32 if values.dtype == torch.float64 else values.dtype
    return TopKTeacher(kept_values.to(dtype), torch.where(kept, ids, 0).to(torch.int32), rest)


def from_samples(ids: Any, temperature: float, *, weights: Any | None, classes: int | None) -> TopKTeacher:
    """Compute `TopKTeacher.from_samples`."""
    temperature = as_float("temperature", temperature)
    check_temperature(temperature)
    ids = _check_ids(torch.as_tensor(ids))
    mass = torch.ones(ids.shape, dtype=torch.float64, device=ids.device)
    if weights is not None:
        mass = torch.as_tensor(weights).double()
        if mass.shape != ids.shape:
            raise ShapeError(f"`weights` have shape {tuple(mass.shape)}: must be {tuple(ids.shape)}, like `ids`")
        bad = ~((mass >= 0) & (mass < torch.inf)) & (ids >= 0)
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise ShapeError(
                f"`weights[{row}, {column}]` is {float(mass[row, column]):g}: pass p / q, finite and not negative"
            )
    drawn = (ids >= 0) & (mass > 0)
    if classes is not None:
        _check_range(ids, drawn, as_int("classes", classes))
    # Runs of the same class in the sorted row: each class once, with the sum of its weights.
    order = torch.where(drawn, ids, -1).argsort(dim=1, stable=True)
    ordered, mass = torch.where(drawn, ids, -1).gather(1, order), torch.where(drawn, mass, 0).gather(1, order)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    sums = torch.zeros_like(mass).scatter_add(1, first.cumsum(1) - 1, mass)
    heads = torch.zeros_like(ordered).scatter(1, first.cumsum(1) - 1, ordered)
    total = sums.sum(1, keepdim=True)
    values = (temperature * (sums / torch.where(total > 0, total, 1)).log()).float()
    tail = torch.where(total.squeeze(1) > 0, -torch.inf, 0.0).float()
    return TopKTeacher(values, heads.clamp_min(0).to(torch.int32), tail)


def log_rest(values: Tensor, classes: int | None) -> Tensor:
    """Return the log-mass of the classes left out, float64 (M,), of log-probabilities (M, k) with -inf where none is.

    Mass that rounding hides counts as `SMALLEST_REST`; -inf where all ``classes`` are kept.
    """
    rest = (1 - values.double().exp().sum(1)).clamp_min(SMALLEST_REST).log()
    if classes is None:
        return rest
    return torch.where(torch.isneginf(values).logical_not().sum(1) >= classes, -torch.inf, rest)


def tempered_tail(rest: Tensor, most: Tensor, rank: Tensor, others: Tensor, power: float) -> Tail:
    """Bound and estimate the log of the sum of p^power over the classes left out.

    Known of them are their mass R, their number n, and that none is more probable than m, the class of rank k. For
    power < 1 (T > 1) the sum is largest if all are alike, n (R / n)^power, and least if as many as possible have the
    probability m. For power > 1 it is the other way round. The estimate is that of a power law of the rank r,
    p = m (r / k)^-a, with the exponent a for which they have the mass R: word frequencies follow one (Zipf's law), and
    it always lies between the bounds.

    Args:
        rest: (M,) log R.
        most: (M,) log m.
        rank: (M,) k, at least 1.
        others: (M,) n; where it is 0, all three results are -inf.
        power: The temperature of the probabilities over that of the loss.

    Raises:
        ShapeError: If n classes of probability m have less mass than R, by more than rounding.
    """
    rest, most, rank, others = rest.double(), most.double(), rank.double(), others.double()
    _check_feasible(rest, most, rank, others)
    rest = torch.minimum(rest, others.log() + most)
    full = (rest - most).exp()
    like_most = power * most + (full.floor() + (full - full.floor()).pow(power)).log()
    like_each_other = others.log() + power * (rest - others.log())
    low, high = torch.minimum(like_most, like_each_other), torch.maximum(like_most, like_each_other)
    exponent = _solve_exponent(full, rank, others)
    estimate = power * most + _power_law_sum(power * exponent, rank, others).log()
    none = (others == 0) | torch.isneginf(rest)
    bounded = torch.minimum(torch.maximum(estimate, low), high)
    return Tail(*(torch.where(none, -torch.inf, x) for x in (bounded, low, high)))


def rank_bound(values: Tensor, top_k: int | Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the log-probability of the last class that is certainly among the most probable, and its rank, (M,).

    A row without such a class has the bound 0, at rank 1.
    """
    count = torch.isneginf(values).logical_not().sum(1)
    top = count if top_k is None else count.clamp(max=top_k)
    rank = top.clamp_min(1)
    most = values.double().sort(1, descending=True).values.gather(1, rank.unsqueeze(1) - 1).squeeze(1)
    return torch.where(top > 0, most, 0.0), rank


def pad_rows(values: Tensor, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of rows of different lengths as (M, k), with -inf and class 0 behind the short ones.

    Raises:
        ShapeError: If the shapes do not fit, or the offsets do not fit the entries.
    """
    if values.dim() != 1 or ids.shape != values.shape or offsets.dim() != 1:
        raise ShapeError(
            f"`values`, `ids` and `offsets` have shapes {tuple(values.shape)}, {tuple(ids.shape)} and "
            f"{tuple(offsets.shape)}: with `offsets`, pass (E,), (E,) and (M + 1,)"
        )
    offsets = offsets.long()
    counts = offsets.diff()
    if len(offsets) == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != len(values) or bool((counts < 0).any()):
        raise ShapeError(f"`offsets` must begin with 0, never fall, and end with {len(values)}, the number of entries")
    k = max(1, int(counts.max()) if len(counts) else 1)
    column = torch.arange(k, device=counts.device)
    inside = column < counts.unsqueeze(1)
    if len(values) == 0:
        return values.new_full((len(counts), k), -torch.inf), ids.new_zeros(len(counts), k)
    at = torch.where(inside, offsets[:-1].unsqueeze(1) + column, 0)
    return torch.where(inside, values[at], -torch.inf), torch.where(inside, ids.long()[at], 0)


def _tempered_rest(values: Tensor, classes: int, top_k: int | None, power: float) -> Tensor:
    parts = []
    for begin in range(0, len(values), _BLOCK_ROWS):
        block = values[begin : begin + _BLOCK_ROWS]
        most, rank = rank_bound(block, top_k)
        others = classes - torch.isneginf(block).logical_not().sum(1)
        parts.append(tempered_tail(log_rest(block, classes), most, rank, others, power).estimate.float())
    return torch.cat(parts) if parts else values.new_empty(0, dtype=torch.float32)


def is_feasible(mass: Any, largest: Any) -> Any:
    """Return which masses are at most the largest possible ones, but for rounding to float16; arrays or tensors."""
    return mass <= 1.05 * largest + 2e-3


def _check_feasible(rest: Tensor, most: Tensor, rank: Tensor, others: Tensor) -> None:
    mass, largest = rest.exp(), others * most.exp()
    bad = ~is_feasible(mass, largest) & (others > 0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ShapeError(
            f"row {row}: {int(others[row])} other classes have the probability {float(mass[row]):.3g}, more than if "
            f"each had that of the class of rank {int(rank[row])}, {float(most[row].exp()):.3g}: check `classes`, and "
            "pass `top_k`, how many of the entries are the most probable ones, if others were added"
        )


def _power_law_sum(exponent: Tensor, rank: Tensor, others: Tensor) -> Tensor:
    """Sum (1 + i / k)^-a over i = 1 ... n: the first terms exactly, the others by the midpoint rule."""
    i = torch.arange(1, _SUMMED + 1, dtype=torch.float64, device=rank.device)
    terms = (-exponent.unsqueeze(1) * torch.log1p(i / rank.unsqueeze(1))).exp()
    first = torch.where(i <= others.unsqueeze(1), terms, 0).sum(1)
    begin = torch.log1p((_SUMMED + 0.5) / rank)
    length = (torch.log1p((others + 0.5) / rank) - begin).clamp_min(0)
    slope = 1 - exponent
    flat = slope.abs() < 1e-9
    slope = torch.where(flat, 1e-9, slope)
    return first + rank * (begin * slope).exp() * torch.expm1(length * slope) / slope


def _solve_exponent(full: Tensor, rank: Tensor, others: Tensor) -> Tensor:
    """Return a >= 0 for which `_power_law_sum` is ``full``, by bisection: it falls from n at 0."""
    low = torch.zeros_like(full)
    # Each term is at most (1 + 1 / k)^-a.
    high = ((others.clamp_min(1).log() - full.log()) / torch.log1p(1 / rank)).clamp_min(0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = _power_law_sum(middle, rank, others) > full
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def _check_entries(values: Tensor, ids: Tensor, classes: int | None) -> tuple[Tensor, Tensor]:
    """Check log-probabilities and ids (M, k), and return the ids and which entries are there."""
    if values.dim() != 2 or ids.shape != values.shape or values.shape[1] == 0:
        raise ShapeError(
            f"`values` and `ids` have shapes {tuple(values.shape)} and {tuple(ids.shape)}: pass both as (M, k), or as "
            "(E,) with `offsets`"
        )
    if not values.is_floating_point():
        raise TypeError(f"`values` are {values.dtype}: pass log-probabilities, floating-point numbers")
    ids = _check_ids(ids)
    kept = ~torch.isneginf(values)
    slack = 2e-2 if values.element_size() <= 2 else 1e-3
    bad = ~(values <= slack)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ShapeError(
            f"`values[{row}, {column}]` is {float(values[row, column]):g}: log-probabilities are at most 0; of logits, "
            "make a teacher with kdfast.topk_teacher"
        )
    _check_range(ids, kept, classes)
    distinct = kept & ~_is_repeated(ids, kept)
    sums = torch.where(distinct, values, -torch.inf).double().exp().sum(1)
    if bool((sums > 1 + slack).any()):
        row = int((sums > 1 + slack).nonzero()[0])
        raise ShapeError(
            f"the probabilities of row {row} sum to {float(sums[row]):.4g}, more than 1: `values` must be "
            "log-probabilities over the whole vocabulary"
        )
    return ids, kept


def _check_ids(ids: Tensor) -> Tensor:
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ShapeError(f"`ids` are {ids.dtype} of shape {tuple(ids.shape)}: pass integers (M, k)")
    return ids.long()


def _check_range(ids: Tensor, kept: Tensor, classes: int | None) -> None:
    bad = kept & ((ids < 0) | (ids >= (2**31 - 1 if classes is None else classes)))
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        least = int(ids[row, column])
        limit = "not be negative" if least < 0 else f"be below {classes or 2**31 - 1}, the number of classes"
        raise IndexError(f"`ids[{row}, {column}]` is {least}: must {limit}")


def _is_repeated(ids: Tensor, kept: Tensor) -> Tensor:
    """Return which kept entries have a class that an earlier one of their row has, (M, k)."""
    left_out = torch.arange(-1, -1 - ids.shape[1], -1, device=ids.device)
    ordered, order = torch.where(kept, ids, left_out).sort(dim=1, stable=True)
    repeated = torch.zeros_like(kept)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(kept).scatter(1, order, repeated)
