"""Count the instructions of the CUDA kernels' main loops, without a GPU. Needs nvcc.

    python bench/count_cuda.py [--arch 90] [--tree DIR]

Compiles csrc/grad_norms/grad_norms.cu of this or another checkout and prints a row for each loop that both reads global
memory and multiplies: `instructions` of its body, `FFMA` among them and their share, `loops` inside it, whose bodies
count once, however often they run. `registers`, `stack` and `shared` (bytes) are of the kernel, and `warps` is how many
its registers and shared memory let a multiprocessor hold, of 64. The stack holds the registers that spill.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import commit, table, write_results
from triton_compile.sass import CUOBJDUMP, LINE, Instruction

ROOT = Path(__file__).parent.parent
SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes of a multiprocessor
RESERVED = {80: 1 << 10, 90: 0}  # bytes of a block for the system that `shared` lacks
REGISTERS, BLOCKS, WARPS = 65536, 32, 64  # of a multiprocessor
KERNEL = re.compile(r"Function : \S*?\d(direct_elements|direct|gram|depthwise)I?(\S*)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=sorted(SHARED), default=90, help="compute capability (default: 90)")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to count (default: this one)")
    arguments = parser.parse_args()
    csrc = arguments.tree / "csrc"
    threads = block_size((csrc / "grad_norms" / "grad_norms.cu").read_text())
    rows = list(count(compile_kernels(csrc, arguments.arch), threads, arguments.arch))
    print(table(rows))
    path = write_results("cuda_counts", rows, nvcc=nvcc_version(), kernels=commit(arguments.tree), arch=arguments.arch)
    print(f"\nwrote {path}")


def nvcc_version() -> str:
    """Return the version of nvcc, such as "13.0"."""
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    assert found, text
    return found[1]


def compile_kernels(csrc: Path, arch: int) -> str:
    """Return the machine code and the resources of all kernels as cuobjdump prints them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        source = csrc / "grad_norms" / "grad_norms.cu"
        flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", f"-I{csrc}"]
        subprocess.run(["nvcc", *flags, "-o", str(cubin), str(source)], check=True)
        dump = [str(CUOBJDUMP), "-sass", "-res-usage", str(cubin)]
        return subprocess.run(dump, check=True, capture_output=True, text=True).stdout


def block_size(source: str) -> int:
    """Return the threads of a block."""
    found = re.search(r"kThreads = (\d+)", source)
    assert found, "grad_norms.cu has no kThreads"
    return int(found[1])


def count(text: str, threads: int, arch: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table."""
    usages = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    resources = {name: (int(registers), int(stack), int(shared)) for name, registers, stack, shared in usages}
    for part in re.split(r"(?=Function : )", text)[1:]:
        name = part.split()[2]
        registers, stack, shared = resources[name]
        kernel = KERNEL.match(part)
        assert kernel, name
        for body, inside in main_loops(instructions(part)):
            ffma = sum(each.base == "FFMA" for each in body)
            yield {
                "kernel": " ".join([kernel[1], *re.findall(r"(?:L[ib]|UseE)(\d+)E", kernel[2])]),
                "instructions": len(body),
                "FFMA": ffma,
                "share": round(ffma / len(body), 2),
                "loops": inside,
                "registers": registers,
                "stack": stack,
                "shared": shared,
                "warps": resident_warps(registers, shared, threads, arch),
            }


def instructions(text: str) -> list[Instruction]:
    """Return the instructions of a kernel."""
    return [
        Instruction(int(address, 16), guard, name, tuple(re.split(r",\s*", operands)))
        for address, guard, name, operands in LINE.findall(text)
    ]


def main_loops(code: list[Instruction]) -> Iterator[tuple[list[Instruction], int]]:
    """Yield the innermost loops that read global memory and multiply, and how many loops each contains."""
    spans = [(int(each.operands[-1], 16), each.address) for each in code if each.base == "BRA"]
    spans = [(begin, end) for begin, end in spans if begin < end]
    bodies = {span: [each for each in code if span[0] <= each.address <= span[1]] for span in spans}

    def is_main(span: tuple[int, int]) -> bool:
        names = {each.base for each in bodies[span]}
        return "FFMA" in names and bool(names & {"LDG", "LDGSTS"})

    for span in filter(is_main, spans):
        inside = [other for other in spans if other != span and span[0] <= other[0] and other[1] <= span[1]]
        if not any(map(is_main, inside)):
            yield bodies[span], len(inside)


def resident_warps(registers: int, shared: int, threads: int, arch: int) -> int:
    """Return the warps that a multiprocessor can hold at a time."""
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    return warps * min(by_registers, SHARED[arch] // (shared + RESERVED[arch]), BLOCKS, WARPS // warps)


if __name__ == "__main__":
    main()
