"""What pruning saves, and from how many students on."""

from __future__ import annotations

import math

from kdfast.planning.stages import Flow


def break_even(pruned: Flow, whole: Flow) -> int | None:
    """Return the least number of students, from 1, from which on the pruned flow is not slower than the whole one.

    None: there is no such number.
    """
    if pruned.student_seconds > whole.student_seconds:
        return None
    more = pruned.shared_seconds - whole.shared_seconds
    if more <= 0:
        return 1
    saved = whole.student_seconds - pruned.student_seconds
    return max(1, math.ceil(more / saved)) if saved > 0 else None
