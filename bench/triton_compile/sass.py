"""Read machine code (SASS): its instructions, the pipes that run them, and the registers and memory of a thread."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

__all__ = ["Code", "Instruction", "disassemble", "pipe_of", "width_of"]

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
PIPES = {
    "MUFU": "MUFU I2F F2F F2I FRND I2I POPC FLO BREV",
    "ALU": (
        "FMNMX FMNMX3 FSETP FSEL FSET FCHK SEL PRMT LOP3 PLOP3 ISETP SHF IADD3 VIADD IMNMX VIMNMX VIMNMX3 VIADDMNMX "
        "LEA I2FP F2FP IABS SGXT BMSK R2P P2R PSETP VOTE"
    ),
    "FP32": "FADD FMUL FFMA FSWZADD",
    "HALF": "HADD2 HMUL2 HFMA2 HMNMX2 HSET2 HSETP2",
    "FP64": "DADD DMUL DFMA DSETP DMNMX",
    "MEMORY": ("LDG STG LDS STS LDL STL LD ST LDSM STSM LDGSTS ATOM ATOMG ATOMS RED REDG SHFL MATCH LDC REDUX UBLKCP"),
    "BARRIER": "BAR SYNCS UCGABAR_ARV UCGABAR_WAIT",
}
PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: Byte offset in the function.
        guard: Predicate under which it acts, such as "P0", "!P0" or "UP1"; "" if it always does.
        name: Operation with its modifiers, such as "LDG.E.128".
        operands: Operands as printed.
    """

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        """The operation without its modifiers."""
        return self.name.split(".", 1)[0]


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel; registers of a thread, and its stack and local memory (spills) in bytes."""

    registers: int
    stack: int
    local: int
    instructions: tuple[Instruction, ...]


@functools.lru_cache(maxsize=64)
def disassemble(cubin: bytes) -> Code:
    """Return the instructions and the resources of the only function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    found = [
        Instruction(int(address, 16), guard, name, tuple(re.split(r",\s*", operands)) if operands else ())
        for address, guard, name, operands in LINE.findall(text)
    ]
    while found and found[-1].name in ("NOP", "BRA"):  # padding: a branch to itself and what follows it
        if found[-1].name == "BRA" and int(found[-1].operands[-1], 16) != found[-1].address:
            break
        found.pop()
    return Code(int(usage["REG"]), int(usage["STACK"]), int(usage["LOCAL"]), tuple(found))


def pipe_of(instruction: Instruction) -> str:
    """Return the pipe that runs an instruction.

    "MUFU" (special functions and slow conversions), "ALU" (integers, comparisons, conversions), "FP32", "IMAD" (integer
    products and moves on the FP32 pipe), "HALF", "FP64", "MEMORY", "BARRIER", or "other" (branches, uniform registers).
    """
    if instruction.base == "IMAD":
        return "IMAD"
    return PIPE.get(instruction.base, "other")


def width_of(instruction: Instruction) -> int:
    """Return the bytes that a thread moves with a load or store."""
    for part in instruction.name.split(".")[1:]:
        if part in ("128", "64"):
            return int(part) // 8
        if re.fullmatch(r"[US](8|16)", part):
            return int(part[1:]) // 8
    return 4
