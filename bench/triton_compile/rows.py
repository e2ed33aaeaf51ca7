"""Run cases and return one row of plain values for each, for tables, files and tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from triton_compile.cases import Case
from triton_compile.counts import count
from triton_compile.driver import recorded_launches

__all__ = ["count_cases"]


def count_cases(chosen: Iterable[Case], arch: int) -> list[dict[str, Any]]:
    """Compile and count cases for a compute capability.

    Raises:
        RuntimeError: If a case does not launch its kernel exactly once.
    """
    return [_row(case, arch) for case in chosen]


def _row(case: Case, arch: int) -> dict[str, Any]:
    with recorded_launches(arch) as launches:
        case.run()
    mine = [launch for launch in launches if launch.kernel == case.kernel]
    if len(mine) != 1:
        raise RuntimeError(f"{case.name} launched {[x.kernel for x in launches]}: expected {case.kernel} once")
    (launch,) = mine
    counted = count(launch, case.elements)
    return {
        "case": case.name,
        "kernel": case.kernel,
        "arch": arch,
        "table": list(case.table),
        "tile": {k: v for k, v in launch.arguments.items() if k in ("ROWS", "BLOCK", "LINES", "COLUMNS")},
        "grid": list(launch.grid),
        "warps": launch.warps,
        "registers": counted.registers,
        "spilled": counted.spilled,
        "shared": launch.shared,
        "instructions": round(counted.instructions, 2),
        "pipes": {pipe: round(x, 2) for pipe, x in counted.pipes.items()},
        "loops": [list(loop) for loop in counted.loops],
        "barriers": counted.barriers,
        "ceiling": round(counted.ceiling(case.traffic / case.elements, arch) / 1e12, 3),
        "widths": {**counted.loads, **counted.stores},
        "expected_widths": case.widths,
        "unknown_branches": counted.unknown_branches,
    }
