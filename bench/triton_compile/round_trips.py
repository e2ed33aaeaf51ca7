"""How often a thread waits for global memory before it can issue its next loads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from triton_compile.sass import Instruction, width_of

__all__ = ["RoundTrips"]

REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass
class RoundTrips:
    """Loads of a thread that depend on each other, or are issued after the thread has waited for others.

    A thread waits at the first instruction that reads or overwrites a register which a load has yet to fill, whether
    its guard lets it act or not. Loads between two waits share a round trip.

    Attributes:
        total: Round trips so far.
    """

    total: int = 0
    _ended: int = 0
    _pending: dict[int, int] = field(default_factory=dict)  # register -> the round trip that fills it

    def issue(self, instruction: Instruction, is_load: bool) -> None:
        """Take note of the next instruction, and of whether it loads from global memory."""
        used = [int(number) for operand in instruction.operands for number in REGISTER.findall(operand)]
        self._ended = max([self._ended, *(self._pending.pop(register, 0) for register in used)])
        if is_load:
            self.total = max(self.total, self._ended + 1)
            words = -(-width_of(instruction) // 4)
            first = int(REGISTER.findall(instruction.operands[0])[0])
            self._pending |= dict.fromkeys(range(first, first + words), self._ended + 1)
