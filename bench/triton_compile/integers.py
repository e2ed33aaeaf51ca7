"""Instructions of machine code that compute integers and conditions, for ``thread``.

Registers hold 32 bits, or None where the value is unknown.
"""

from __future__ import annotations

import contextlib
import math
import operator
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from triton_compile.sass import Instruction

__all__ = ["OPERATIONS", "Registers", "operand_value", "predicate_value"]

MASK = 0xFFFFFFFF
PREDICATE = re.compile(r"!?U?P(\d|T)$")
REGISTER = re.compile(r"(U?R)(\d+|Z)$")
CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]$")
COMPARE: dict[str, Callable[[float, float], bool]] = {
    "EQ": operator.eq, "NE": operator.ne, "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
}  # fmt: skip


@dataclass
class Registers:
    """State of a thread: constant words by offset, registers and predicates by name; a missing one is unknown."""

    constants: dict[int, int]
    values: dict[str, int | None] = field(default_factory=dict)
    predicates: dict[str, bool | None] = field(default_factory=dict)

    def write(self, operand: str, value: int | None, wide: bool = False) -> None:
        """Set a register, or two if ``wide``; RZ stays zero."""
        found = REGISTER.match(operand)
        if found is None or found[2] == "Z":
            return
        self.values[operand] = None if value is None else value & MASK
        if wide:
            self.values[f"{found[1]}{int(found[2]) + 1}"] = None if value is None else (value >> 32) & MASK

    def set_predicate(self, operand: str, value: bool | None) -> None:
        """Set a predicate; PT stays true."""
        if not operand.endswith("PT"):
            self.predicates[operand] = value


Operation = Callable[[Instruction, Registers, bool], None]
"""What an instruction does to the state; True if its guard is unknown, so that it may do nothing."""


def predicate_value(operand: str, registers: Registers) -> bool | None:
    """Return the value of "P0", "!P0", "UP0" or "PT"."""
    name = operand.lstrip("!")
    value = True if name.endswith("PT") else registers.predicates.get(name)
    return value if value is None or not operand.startswith("!") else not value


def operand_value(operand: str, registers: Registers, wide: bool = False) -> int | None:
    """Return the unsigned value of a register, constant or number with 32 bits, or 64 if ``wide``."""
    text = operand.replace(".reuse", "").strip()
    bits = 64 if wide else 32
    if text[0] in "-~" and (text[1] in "RUc|"):
        value = operand_value(text[1:], registers, wide)
        if value is None:
            return None
        return (-value if text[0] == "-" else ~value) & (1 << bits) - 1
    name = text.split(".")[0]
    found = REGISTER.match(name)
    if found:
        low, high = name, "RZ" if found[2] == "Z" else f"{found[1]}{int(found[2]) + 1}"
        values = [0 if x.endswith("Z") else registers.values.get(x) for x in ((low, high) if wide else (low,))]
    elif found := CONSTANT.match(text):
        values = [registers.constants.get(int(found[1], 16) + 4 * i) for i in range(2 if wide else 1)]
    else:
        try:
            return int(text, 0) & (1 << bits) - 1
        except ValueError:
            return None  # a floating-point number, another bank, or a special register
    return None if None in values else sum(x << 32 * i for i, x in enumerate(values) if x)


def split(instruction: Instruction) -> tuple[str, list[str], list[str], list[str]]:
    """Return the destination, and the predicates before, the sources, and the predicates after them."""
    operands = [x.replace(".reuse", "") for x in instruction.operands]
    first = 0
    while first < len(operands) and PREDICATE.match(operands[first]):
        first += 1
    before = operands[:first]
    destination = operands[first] if first < len(operands) else ""
    rest = operands[first + 1 :]
    while rest and PREDICATE.match(rest[0]):
        before.append(rest.pop(0))
    last = len(rest)
    while last and PREDICATE.match(rest[last - 1]):
        last -= 1
    return destination, before, rest[:last], rest[last:]


def signed(value: int) -> int:
    """Return 32 bits as a signed number."""
    return value - (1 << 32) if value >> 31 else value


def unknown(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """Forget what an instruction writes that is not computed."""
    destination, before, _, _ = split(instruction)
    for predicate in before:
        registers.set_predicate(predicate, None)
    found = REGISTER.match(destination)
    count = 4 if ".128" in instruction.name else 2 if "64" in instruction.name or instruction.base[0] == "D" else 1
    if found and found[2] != "Z":
        for i in range(count):
            registers.write(f"{found[1]}{int(found[2]) + i}", None)


def load(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """Load zeros."""
    unknown(instruction, registers, unsure)
    found = REGISTER.match(instruction.operands[0])
    if found and found[2] != "Z":
        for i in range(4 if ".128" in instruction.name else 2 if ".64" in instruction.name else 1):
            registers.write(f"{found[1]}{int(found[2]) + i}", 0)


def number(
    compute: Callable[[Instruction, list[int], list[bool]], tuple[int, list[int | bool]]], wide: int = -1
) -> Operation:
    """Make an operation from a function of sources and trailing predicates that returns a number and predicates.

    ``wide`` is the position of a source with 64 bits where the name has WIDE or HI.
    """

    def run(instruction: Instruction, registers: Registers, unsure: bool) -> None:
        destination, before, sources, after = split(instruction)
        is_wide = wide >= 0 and ".WIDE" in instruction.name
        has_wide = is_wide or ".HI" in instruction.name
        values = [operand_value(x, registers, has_wide and i == wide) for i, x in enumerate(sources)]
        conditions = [predicate_value(x, registers) for x in after]
        if unsure or None in values or None in conditions:
            registers.write(destination, None, is_wide)
            for predicate in before:
                registers.set_predicate(predicate, None)
            return
        result, flags = compute(instruction, values, conditions)  # type: ignore[arg-type]
        registers.write(destination, result, is_wide)
        for predicate, flag in zip(before, flags, strict=False):
            registers.set_predicate(predicate, bool(flag))

    return run


def add(instruction: Instruction, x: list[int], carries: list[bool]) -> tuple[int, list[int | bool]]:
    """IADD3, VIADD: the sum; its carries are predicates. A subtrahend b counts as 2^32 - b even if it is zero."""
    sources = split(instruction)[2]
    total = sum(1 << 32 if s[0] == "-" and v == 0 and s[1] in "RUc" else v for s, v in zip(sources, x, strict=True))
    total += sum(carries) if ".X" in instruction.name else 0
    return total, [total >> 32 >= 1, total >> 32 >= 2]


def multiply_add(instruction: Instruction, x: list[int], carries: list[bool]) -> tuple[int, list[int | bool]]:
    """IMAD: a * b + c, or its 64 bits or their high word, with 64 bits of c."""
    a, b, c = x[0], x[1], x[2] if len(x) > 2 else 0
    if ".U32" not in instruction.name and (".WIDE" in instruction.name or ".HI" in instruction.name):
        a, b = signed(a), signed(b)
    if ".HI" in instruction.name:
        return a * b + c >> 32, []
    total = a * b + c + (sum(carries) if ".X" in instruction.name else 0)
    return total, [total >> (64 if ".WIDE" in instruction.name else 32) > 0]


def shifted_add(instruction: Instruction, x: list[int], carries: list[bool]) -> tuple[int, list[int | bool]]:
    """LEA: (a << s) + b, or with HI the high word of {c, a} << s, plus b."""
    a, b, shift = x[0], x[1], x[-1]
    carry = sum(carries) if ".X" in instruction.name else 0
    if ".HI" not in instruction.name:
        total = ((a << shift) & MASK) + b + carry
    else:
        high = (MASK if a >> 31 else 0) if ".SX32" in instruction.name else x[2]
        total = (((high << 32 | a) << shift) >> 32 & MASK) + b + carry
    return total, [total >> 32]


def funnel_shift(instruction: Instruction, x: list[int], _: list[bool]) -> tuple[int, list[int | bool]]:
    """SHF: shift {c, a} by b bits and keep one word."""
    low, shift, high = x
    name = instruction.name
    if ".W" in name:
        shift &= 63 if "64" in name else 31
    both = high << 32 | low
    if ".S32" in name or ".S64" in name:
        both -= 1 << 64 if high >> 31 else 0
    if ".L" in name:
        result = both << shift >> 32 if ".HI" in name else low << shift
    elif ".HI" in name:
        result = both >> 32 >> shift
    else:
        result = both >> shift
    return result & MASK, []


def bitwise(instruction: Instruction, x: list[int], _: list[bool]) -> tuple[int, list[int | bool]]:
    """LOP3: any function of three bits, by its table."""
    a, b, c, table = x
    result = 0
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & MASK, [result & MASK != 0]


def either(instruction: Instruction, x: list[int], first: list[bool]) -> tuple[int, list[int | bool]]:
    """SEL and the minima and maxima: one of two sources."""
    a, b = x[:2]
    if "MNMX" in instruction.base:
        less = (a < b) if ".U32" in instruction.name else (signed(a) < signed(b))
        return (a if less == first[0] else b), []
    return (a if first[0] else b), []


def absolute(instruction: Instruction, x: list[int], _: list[bool]) -> tuple[int, list[int | bool]]:
    """IABS."""
    return abs(signed(x[0])), []


def permute(instruction: Instruction, x: list[int], _: list[bool]) -> tuple[int, list[int | bool]]:
    """PRMT: pick four of eight bytes."""
    data = (x[0] | x[2] << 32).to_bytes(8, "little")
    picked = [x[1] >> 4 * i & 15 for i in range(4)]
    out = [(0xFF if data[p & 7] >> 7 else 0) if p & 8 else data[p & 7] for p in picked]
    return int.from_bytes(bytes(out), "little"), []


def extend(instruction: Instruction, x: list[int], _: list[bool]) -> tuple[int, list[int | bool]]:
    """SGXT: keep the low bits of a number, with the sign of the highest unless U32."""
    low = x[0] & (1 << x[1]) - 1
    negative = ".U32" not in instruction.name and x[1] and low >> (x[1] - 1)
    return low - ((1 << x[1]) if negative else 0), []


def bit_mask(instruction: Instruction, x: list[int], _: list[bool]) -> tuple[int, list[int | bool]]:
    """BMSK: ones from one bit on."""
    return ((1 << x[1]) - 1) << x[0], []


def compare(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """ISETP: compare, and combine with a predicate; with EX the high words, after the low ones."""
    _, relation, *rest = instruction.name.split(".")
    first, second, *sources = [x.replace(".reuse", "") for x in instruction.operands]
    a, b = (operand_value(x, registers) for x in sources[:2])
    conditions = [predicate_value(x, registers) for x in sources[2:]]
    result: bool | None = None
    if a is not None and b is not None:
        if "U32" not in rest:
            a, b = signed(a), signed(b)
        result = COMPARE[relation](a, b)
        if "EX" in rest and (a == b if relation != "NE" else not result):
            result = conditions[-1]
    both = [result, conditions[0]]
    negated = [None if result is None else not result, conditions[0]]
    combine = {"AND": _all, "OR": _any, "XOR": _xor}[next(x for x in rest if x in ("AND", "OR", "XOR"))]
    registers.set_predicate(first, None if unsure else combine(both))
    registers.set_predicate(second, None if unsure else combine(negated))


def _all(x: list[bool | None]) -> bool | None:
    return False if False in x else None if None in x else True


def _any(x: list[bool | None]) -> bool | None:
    return True if True in x else None if None in x else False


def _xor(x: list[bool | None]) -> bool | None:
    return None if None in x else x[0] != x[1]


def combine_predicates(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """PLOP3: any function of three predicates, by its table; unknown ones may not matter."""
    operands = [x.strip() for x in instruction.operands]
    values = [predicate_value(x, registers) for x in operands[2:5]]
    for predicate, table in zip(operands[:2], operands[5:7], strict=True):
        bits = {
            int(table, 0) >> i & 1
            for i in range(8)
            if all(v is None or v == bool(i & mask) for v, mask in zip(values, (4, 2, 1), strict=True))
        }
        registers.set_predicate(predicate, None if unsure or len(bits) > 1 else bool(bits.pop()))


def move(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """MOV, constant loads, special registers (all zero: thread 0 of block 0), and R2UR."""
    destination, _, sources, _ = split(instruction)
    wide = ".64" in instruction.name or (instruction.base == "CS2R" and ".32" not in instruction.name)
    source = "RZ" if sources[0].startswith("SR") else sources[0]
    registers.write(destination, None if unsure else operand_value(source, registers, wide), wide)


def to_float(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """I2F: an integer as float32, rounded to the nearest or up, the first step of a division of integers."""
    destination, _, sources, _ = split(instruction)
    parts = instruction.name.split(".")
    wide = "U64" in parts or "S64" in parts
    value = None if "F64" in parts or "F16" in parts else operand_value(sources[0], registers, wide)
    if unsure or value is None:
        unknown(instruction, registers, unsure)
        return
    if not {"U32", "U64"} & set(parts) and value >> (63 if wide else 31):
        value -= 1 << (64 if wide else 32)
    bits = float_bits(float(value))
    if "RP" in parts and from_bits(bits) < value:
        bits += 1 if value > 0 else -1
    registers.write(destination, bits)


def reciprocal(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """MUFU: the reciprocal of a known float32, the second step of a division; other functions are unknown."""
    destination, _, sources, _ = split(instruction)
    bits = operand_value(sources[0], registers)
    if unsure or instruction.name != "MUFU.RCP" or not bits or not math.isfinite(from_bits(bits)):
        unknown(instruction, registers, unsure)
    else:
        registers.write(destination, float_bits(1 / from_bits(bits)))


def to_integer(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """F2I: a known float32 as an integer, rounded to zero, the third step of a division."""
    destination, _, sources, _ = split(instruction)
    parts = instruction.name.split(".")
    bits = operand_value(sources[0], registers)
    if unsure or bits is None or "F64" in parts or "TRUNC" not in parts or not math.isfinite(from_bits(bits)):
        unknown(instruction, registers, unsure)
    else:
        wide = "U64" in parts or "S64" in parts
        registers.write(destination, int(from_bits(bits)) & (1 << (64 if wide else 32)) - 1, wide)


def float_bits(value: float) -> int:
    """Return the bits of a number rounded to float32."""
    return int.from_bytes(struct.pack("<f", value), "little")


def from_bits(bits: int) -> float:
    """Return the float32 with these bits."""
    value: float = struct.unpack("<f", bits.to_bytes(4, "little"))[0]
    return value


def float_operand(operand: str, registers: Registers) -> float | None:
    """Return the value of a float32 register, constant or number."""
    text = operand.replace(".reuse", "").strip()
    negative, text = text.startswith("-"), text.lstrip("-+")
    magnitude, text = text.startswith("|"), text.strip("|")
    if text[0] in "RUc":
        bits = operand_value(text, registers)
        value = None if bits is None else from_bits(bits)
    else:
        value = {"INF": math.inf, "QNAN": math.nan}.get(text)
        value = float(text) if value is None else value
    if value is None:
        return None
    value = abs(value) if magnitude else value
    return -value if negative else value


def multiply(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """FMUL: of known numbers, such as the factor that decides whether a kernel has anything to do."""
    destination, _, sources, _ = split(instruction)
    a, b = (float_operand(x, registers) for x in sources[:2])
    product = None if unsure or a is None or b is None else a * b
    registers.write(destination, float_bits(product) if product is not None and abs(product) < 1e38 else None)


def compare_floats(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """FSETP: compare float32, and combine with a predicate; U is true also if one is NaN."""
    _, relation, *rest = instruction.name.split(".")
    first, second, a, b, condition = instruction.operands[:5]
    x, y = float_operand(a, registers), float_operand(b, registers)
    if unsure or x is None or y is None or relation in ("NAN", "NUM"):
        forget_predicates(instruction, registers, unsure)
        return
    result = relation.endswith("U") if math.isnan(x) or math.isnan(y) else COMPARE[relation.removesuffix("U")](x, y)
    combine = {"AND": _all, "OR": _any, "XOR": _xor}[next(z for z in rest if z in ("AND", "OR", "XOR"))]
    registers.set_predicate(first, combine([result, predicate_value(condition, registers)]))
    registers.set_predicate(second, combine([not result, predicate_value(condition, registers)]))


def half_constant(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """HFMA2 of zeros and two numbers, which is how a constant may be written; other products are unknown."""
    destination, _, sources, _ = split(instruction)
    value = None
    if sources[:2] == ["-RZ", "RZ"] and not unsure:
        with contextlib.suppress(ValueError):
            low, high = (int.from_bytes(struct.pack("<e", float(x)), "little") for x in (sources[3], sources[2]))
            value = high << 16 | low
    registers.write(destination, value)


def exchange(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """SHFL, REDUX: another thread's value, or the warp's extreme; all threads are taken to hold the same."""
    _, before, _, _ = split(instruction)
    destination, source = [x for x in instruction.operands if not PREDICATE.match(x)][:2]
    registers.write(destination, None if unsure or ".SUM" in instruction.name else operand_value(source, registers))
    for predicate in before:
        registers.set_predicate(predicate, None)


def vote(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """VOTE: whether any or all threads of the warp have a condition; all are taken to agree."""
    value = None if unsure else predicate_value(instruction.operands[-1], registers)
    for operand in instruction.operands[:-1]:
        registers.write(operand, None)
        if PREDICATE.match(operand):
            registers.set_predicate(operand, value)


def pack_predicates(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """P2R: predicates to the bits of a register, under a mask."""
    destination, _, sources, _ = split(instruction)
    base, mask = (operand_value(x, registers) for x in sources[1:3])
    values = [registers.predicates.get(f"P{i}") for i in range(7)]
    if unsure or base is None or mask is None or any(values[i] is None for i in range(7) if mask >> i & 1):
        registers.write(destination, None)
    else:
        bits = sum(1 << i for i, value in enumerate(values) if value)
        registers.write(destination, base & ~mask | bits & mask)


def unpack_predicates(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """R2P: the bits of a register to predicates, under a mask."""
    value, mask = (operand_value(x, registers) for x in instruction.operands[1:3])
    for i in range(7):
        if mask is None or mask >> i & 1:
            registers.set_predicate(f"P{i}", None if unsure or value is None else bool(value >> i & 1))


def forget_predicates(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """Comparisons of floating-point numbers and votes, which write predicates only."""
    for operand in instruction.operands[:2]:
        if PREDICATE.match(operand):
            registers.set_predicate(operand, None)


def forget_all(instruction: Instruction, registers: Registers, unsure: bool) -> None:
    """B2R and others that write registers and predicates in any position."""
    for operand in instruction.operands:
        registers.write(operand, None)
        if PREDICATE.match(operand):
            registers.set_predicate(operand, None)


OPERATIONS: dict[str, Operation] = {
    "": unknown,
    "LDG": load,
    "ISETP": compare,
    "PLOP3": combine_predicates,
    "VOTE": vote,
    "VOTEU": vote,
    "SHFL": exchange,
    "REDUX": exchange,
    "P2R": pack_predicates,
    "R2P": unpack_predicates,
    "B2R": forget_all,
    "HFMA2": half_constant,
    "FMUL": multiply,
    "FSETP": compare_floats,
    "I2F": to_float,
    "I2FP": to_float,
    "MUFU": reciprocal,
    "F2I": to_integer,
    **dict.fromkeys(("DSETP", "HSETP2", "FCHK"), forget_predicates),
    **dict.fromkeys(("MOV", "S2R", "CS2R", "LDC", "R2UR"), move),
    **dict.fromkeys(("IADD3", "VIADD"), number(add)),
    "IMAD": number(multiply_add, wide=2),
    "LEA": number(shifted_add),
    "SHF": number(funnel_shift),
    "LOP3": number(bitwise),
    **dict.fromkeys(("SEL", "FSEL", "IMNMX", "VIMNMX"), number(either)),
    "IABS": number(absolute),
    "PRMT": number(permute),
    "SGXT": number(extend),
    "BMSK": number(bit_mask),
}
for _name in ("ISETP", "PLOP3", "MOV", "IADD3", "IMAD", "LEA", "SHF", "LOP3", "SEL", "SGXT", "BMSK", "PRMT"):
    OPERATIONS[f"U{_name}"] = OPERATIONS[_name]
OPERATIONS |= {"ULDC": move, "LDCU": move, "S2UR": move}
