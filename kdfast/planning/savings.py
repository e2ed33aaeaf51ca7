"""What pruning saves, and for how many students."""

from __future__ import annotations

import math

from kdfast.planning.stages import Flow

_EQUAL = 1e-9  # share of a student's seconds, for sums in another order


def paying_students(pruned: Flow, whole: Flow) -> tuple[int, int | None] | None:
    """Return the least and the greatest number of students for which the pruned flow is not slower than the whole one.

    The greatest is None if there is no limit. None: there is no such number, from 1.
    """
    jobs, more = pruned.jobs, pruned.shared_seconds - whole.shared_seconds
    saved = whole.each.seconds - pruned.each.seconds  # whenever so many students as there are jobs are trained
    if abs(saved) <= _EQUAL * whole.each.seconds:
        saved = 0.0
    if more <= 0:
        if saved >= 0:
            return 1, None
        rounds = math.floor(more / saved)
        return (1, rounds * jobs) if rounds else None
    return ((math.ceil(more / saved) - 1) * jobs + 1, None) if saved > 0 else None
