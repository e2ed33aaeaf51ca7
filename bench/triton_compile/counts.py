"""What a launch costs: instructions an element by pipe, widths of loads and stores, and the ceiling that follows.

The ceiling is the memory traffic a second if a warp scheduler issued one instruction in every cycle, or as many as the
busiest pipe takes: an upper bound, as if no warp ever waited for memory or a barrier. It assumes 4 schedulers in each
multiprocessor; 132 multiprocessors at 1.98 GHz for sm_90 (H100, H200) and 108 at 1.41 GHz for sm_80 (A100); and that a
warp keeps a pipe of a scheduler busy for the cycles in ``CYCLES`` (throughput table of the CUDA C++ Programming Guide).
Counted is thread 0 of block 0, see ``thread``, for all warps of all blocks, so that it is exact for kernels whose
blocks all have the same work. A kernel reaches perhaps one half to two thirds of its ceiling.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from math import prod

from triton_compile.driver import PROCESSORS, Launch
from triton_compile.sass import disassemble, pipe_of
from triton_compile.thread import ARGUMENT_BITS, Trace, follow

__all__ = ["Count", "constants", "count"]

CLOCK = {80: 1.41e9, 90: 1.98e9}  # Hz
SCHEDULERS = 4  # of a multiprocessor
CYCLES = {"MUFU": 8, "ALU": 2, "FP32": 1, "IMAD": 2, "HALF": 1, "FP64": 2, "MEMORY": 4}
FIRST_ARGUMENT = {80: 0x160, 90: 0x210}  # offset in constant bank 0
SIZES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "fp32": 4, "i64": 8, "u64": 8, "fp64": 8}


@dataclass(frozen=True)
class Count:
    """Costs of a launch.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of stack and local memory of a thread.
        instructions: Instructions that a thread issues, for each element of the whole launch.
        pipes: The same by pipe.
        loops: Instructions of the body and passes of each loop that a thread runs.
        barriers: Barriers that a thread meets.
        round_trips: Waits for global memory, see ``round_trips``.
        cycles: Cycles of a scheduler for each warp of 32 elements, at perfect issue.
        loads: Width in bytes in which most bytes of an argument are loaded, by argument.
        stores: The same of stores.
        unknown_branches: Branches whose condition could not be computed.
    """

    registers: int
    spilled: int
    instructions: float
    pipes: dict[str, float]
    loops: list[tuple[int, int]]
    barriers: int
    round_trips: int
    cycles: float
    loads: dict[str, int]
    stores: dict[str, int]
    unknown_branches: int

    def ceiling(self, bytes_per_element: float, arch: int) -> float:
        """Return the bytes a second at perfect issue."""
        elements = PROCESSORS[arch] * SCHEDULERS * CLOCK[arch] * 32 / self.cycles
        return elements * bytes_per_element


def count(launch: Launch, elements: int) -> Count:
    """Count what a launch costs for each of its elements, over all blocks."""
    code = disassemble(launch.cubin)
    trace = follow(code, constants(launch))
    pipes: Counter[str] = Counter()
    for position, times in trace.issued.items():
        pipes[pipe_of(code.instructions[position])] += times
    threads = prod(launch.grid) * launch.ctas * launch.warps * 32
    issued = sum(pipes.values())
    busiest = max(issued, *(CYCLES[pipe] * times for pipe, times in pipes.items() if pipe in CYCLES))
    return Count(
        registers=code.registers,
        spilled=code.stack + code.local,
        instructions=issued * threads / elements,
        pipes={pipe: times * threads / elements for pipe, times in sorted(pipes.items())},
        loops=loops(trace),
        barriers=pipes["BARRIER"],
        round_trips=trace.round_trips.total,
        cycles=busiest * threads / elements,
        loads=widths(launch, trace, "load"),
        stores=widths(launch, trace, "store"),
        unknown_branches=len(trace.unknown_branches),
    )


def constants(launch: Launch) -> dict[int, int]:
    """Return the 32-bit words of constant bank 0: threads, blocks, arguments; a pointer says which argument it is."""
    words = dict(zip(range(0, 24, 4), (launch.warps * 32, 1, 1, *launch.grid), strict=True))
    offset = FIRST_ARGUMENT[launch.arch]
    for position, (name, type_) in enumerate(launch.types.items()):
        if type_ == "constexpr":
            continue
        value = launch.arguments[name]
        size = 8 if type_[0] == "*" else SIZES[type_]
        if type_[0] == "*":
            number = (2 * position + 1) << ARGUMENT_BITS - 1
        elif type_.startswith("fp"):
            number = int.from_bytes(struct.pack("<f" if size == 4 else "<d", value), "little")
        else:
            number = int(value) & (1 << 8 * size) - 1
        offset = -(-offset // size) * size
        for byte, part in enumerate(number.to_bytes(size, "little")):
            at = offset + byte
            words[at & ~3] = words.get(at & ~3, 0) | part << 8 * (at & 3)
        offset += size
    return words


def widths(launch: Launch, trace: Trace, kind: str) -> dict[str, int]:
    """Return the width in bytes that moves most bytes of each argument; "?" where an address is not known."""
    names = list(launch.types)
    moved: dict[str, Counter[int]] = {}
    for (position, what, width), times in trace.accesses.items():
        if what == kind:
            name = names[position] if 0 <= position < len(names) else "?"
            moved.setdefault(name, Counter())[width] += times * width
    return {name: counter.most_common(1)[0][0] for name, counter in sorted(moved.items())}


def loops(trace: Trace) -> list[tuple[int, int]]:
    """Return the instructions of the body and the passes of each loop that was run, in the order of the code."""
    return [(last - first + 1, trace.issued[last]) for first, last in sorted(trace.backward)]
