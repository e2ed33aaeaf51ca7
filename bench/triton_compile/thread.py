"""Follow one thread through machine code, to count what a warp issues.

Integers, conditions and addresses are computed; most floating-point values and shared memory are unknown. Global
loads return zero: a label, a row and a class id of zero are in range. The other threads of the warp are taken to hold
what the thread holds. A branch whose condition is unknown is not taken, so that the code that it may skip is counted,
and a loop that it may repeat runs once. Every instruction on the way counts, whether its guard lets it act or not,
since a warp issues it in either case.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from triton_compile.integers import OPERATIONS, Registers, operand_value, predicate_value
from triton_compile.round_trips import RoundTrips
from triton_compile.sass import Code, Instruction, width_of

__all__ = ["ARGUMENT_BITS", "Trace", "follow"]

MAX_STEPS = 5_000_000
ARGUMENT_BITS = 40  # the position of the argument that an address belongs to is address >> 40
ADDRESS = re.compile(r"\[([^\]]*)\]$")


@dataclass
class Trace:
    """What one thread did.

    Attributes:
        issued: How often each instruction was issued, by its position in the code.
        backward: First and last position of each loop's body: the backward branches that were taken.
        accesses: Number of global accesses by (position of the argument, "load" or "store", bytes); -1 is an address
            that is not known.
        unknown_branches: Positions of branches whose condition was unknown.
        round_trips: Waits for global memory.
    """

    issued: Counter[int] = field(default_factory=Counter)
    backward: set[tuple[int, int]] = field(default_factory=set)
    accesses: Counter[tuple[int, str, int]] = field(default_factory=Counter)
    unknown_branches: set[int] = field(default_factory=set)
    round_trips: RoundTrips = field(default_factory=RoundTrips)


def follow(code: Code, constants: dict[int, int]) -> Trace:
    """Follow thread 0 of block 0.

    Args:
        code: The kernel.
        constants: 32-bit words of constant bank 0 by their byte offset.

    Raises:
        RuntimeError: If the thread does not end within five million instructions.
    """
    trace, registers = Trace(), Registers(constants)
    position = {instruction.address: i for i, instruction in enumerate(code.instructions)}
    returns: list[int] = []
    at = 0
    for _ in range(MAX_STEPS):
        instruction = code.instructions[at]
        trace.issued[at] += 1
        active = predicate_value(instruction.guard, registers) if instruction.guard else True
        at += 1
        trace.round_trips.issue(instruction, instruction.base == "LDG" and active is not False)
        match instruction.base:
            case "BRA" | "CALL":
                going = _taken(instruction, active, registers)
                if going is None:
                    trace.unknown_branches.add(at - 1)
                if going:
                    target = position[int(instruction.operands[-1], 16)]
                    if instruction.base == "CALL":
                        returns.append(at)
                    elif target < at:
                        trace.backward.add((target, at - 1))
                    at = target
            case "RET" if active is not False:
                at = returns.pop()
            case "EXIT" if active is True:
                return trace
            case "BRX" | "JMP" | "JMX":
                raise RuntimeError(f"{instruction.name} is not followed")
            case _ if active is not False:
                _access(instruction, registers, trace)
                OPERATIONS.get(instruction.base, OPERATIONS[""])(instruction, registers, active is None)
    raise RuntimeError(f"no end after {MAX_STEPS} instructions")


def _taken(instruction: Instruction, active: bool | None, registers: Registers) -> bool | None:
    if instruction.name == "BRA.DIV":  # taken if the threads of the warp have diverged
        return False
    for operand in instruction.operands[:-1]:
        if active is not False and re.fullmatch(r"!?U?P\w+", operand):
            value = predicate_value(operand, registers)
            active = value if active is True else False if value is False else None
    return active


def _access(instruction: Instruction, registers: Registers, trace: Trace) -> None:
    kind = {"LDG": "load", "STG": "store", "LDGSTS": "load"}.get(instruction.base)
    if kind is None:
        return
    address = 0
    found = [m[1] for operand in instruction.operands if (m := ADDRESS.search(operand))]
    for term in re.findall(r"-?[^+-]+", found[-1]):
        value = operand_value(term, registers, wide=".64" in term)
        if value is None:
            address = -1 << ARGUMENT_BITS
            break
        address += value
    trace.accesses[address >> ARGUMENT_BITS, kind, width_of(instruction)] += 1
