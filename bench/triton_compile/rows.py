"""Run cases and return one row of plain values for each, for tables, files and tests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

from triton_compile.cases import Case, launched_kernels
from triton_compile.counts import count
from triton_compile.driver import PROCESSORS, recorded_launches

__all__ = ["count_cases"]


def count_cases(chosen: Iterable[Case], arch: int) -> list[dict[str, Any]]:
    """Compile and count cases for a compute capability.

    Raises:
        RuntimeError: If a case does not launch its kernel exactly once.
    """
    launched_kernels()  # imports the modules whose functions are replaced for each case
    return [_row(case, arch) for case in chosen]


@contextlib.contextmanager
def processors_of(arch: int) -> Iterator[None]:
    """Make launch code, which asks for a device's multiprocessors to size its grid, see those of an architecture."""
    modules = [module for name, module in sys.modules.items() if name.startswith("kdfast.ops")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "processors"):
                stack.enter_context(mock.patch.object(module, "processors", return_value=PROCESSORS[arch]))
        yield


def _row(case: Case, arch: int) -> dict[str, Any]:
    with processors_of(arch), recorded_launches(arch) as launches:
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
        "round_trips": counted.round_trips,
        "ceiling": round(counted.ceiling(case.traffic / case.elements, arch) / 1e12, 3),
        "widths": {**counted.loads, **counted.stores},
        "expected_widths": case.widths,
        "unknown_branches": counted.unknown_branches,
        "data_branches": case.data_branches,
    }
