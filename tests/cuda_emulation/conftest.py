"""Builds csrc/**/*.cu for a CPU, with a scheduler of fibers for the threads of a block, and runs the kernels there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"kdfast-cuda-emulation-{os.getuid() if hasattr(os, 'getuid') else 0}"
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DKDFAST_WITH_CUDA=1"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
COMPILER = os.environ.get("CXX", "g++")

# kernel<<<grid, threads>>>(arguments);
LAUNCH = re.compile(r"(?P<kernel>[\w:]+(?:<[^<>;]*>)?)<<<(?P<config>.*?)>>>\((?P<arguments>.*?)\);", re.DOTALL)
# __shared__ Type name[size];
SHARED = re.compile(r"__shared__\s+(?P<type>[\w:<>, ]+?)\s+(?P<name>\w+)(?P<size>(?:\[[^\];]+\])*);")
# Constants that only decide how blocks share the work, so small that small layers reach every way to share it.
SMALL = {"kElementBlocks": 4, "kSumBlocks": 4, "kMaxAdded": 2}


class EmulationError(AssertionError):
    """A kernel crashed, a sanitizer reported it, or its threads wait for each other."""


def to_cpp(source: str) -> str:
    """Turn CUDA C++ into C++ that calls the emulator; the numbers of the lines stay."""
    source = LAUNCH.sub(r"emulation::launch([&] { \g<kernel>(\g<arguments>); }, \g<config>);", source)
    source = SHARED.sub(r"auto& \g<name> = emulation::shared<\g<type>\g<size>>(__COUNTER__);", source)
    left = re.search(r"^.*(<<<|__shared__).*$", source, re.MULTILINE)
    assert not left, f"the emulation does not understand: {left and left[0].strip()}"
    return source


def shrink(source: str) -> str:
    """Replace the constants of SMALL, which a source of csrc defines."""
    for name, value in SMALL.items():
        source, count = re.subn(rf"({name} = )\d+;", rf"\g<1>{value};", source)
        assert count == 1, f"{count} definitions of {name}"
    return source


def compile_program(program: Path, units: dict[str, Path | str]) -> None:
    """Compile units, files or text by name, and link them."""
    includes = [f"-I{CSRC}", f"-I{HERE / 'include'}", f"-I{HERE}"]
    with tempfile.TemporaryDirectory(dir=program.parent) as name:
        folder = Path(name)
        jobs = []
        for unit, source in units.items():
            path = source if isinstance(source, Path) else folder / f"{unit}.cpp"
            if isinstance(source, str):
                path.write_text(source)
            command = [COMPILER, *FLAGS, *includes, "-c", str(path), "-o", str(folder / f"{unit}.o")]
            jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        errors = [job.communicate()[1] for job in jobs]
        assert not any(job.returncode for job in jobs), "\n".join(errors)
        objects = [str(folder / f"{unit}.o") for unit in units]
        subprocess.run([COMPILER, *FLAGS, *objects, "-o", str(folder / "program")], check=True)
        (folder / "program").rename(program)


def build(units: dict[str, Path | str]) -> Path:
    """Return the program of these units and the emulator, compiled unless the same has been compiled before."""
    units = {**units, "emulator": HERE / "emulator.cpp"}
    digest = hashlib.sha256(" ".join((COMPILER, *FLAGS)).encode())
    for path in sorted((*HERE.rglob("*.h"), *CSRC.rglob("*.h"))):
        digest.update(path.read_bytes())
    for unit in units.values():
        digest.update(unit.read_bytes() if isinstance(unit, Path) else unit.encode())
    CACHE.mkdir(mode=0o700, exist_ok=True)
    program = CACHE / digest.hexdigest()[:32]
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            compile_program(program, units)
    return program


def kernel_units() -> dict[str, Path | str]:
    """Return every CUDA source, translated, and what the kernels call on the host."""
    units: dict[str, Path | str] = {path.stem: to_cpp(path.read_text()) for path in sorted(CSRC.rglob("*.cu"))}
    units["grad_norms"] = shrink(str(units["grad_norms"]))
    return {**units, "validation": CSRC / "grad_norms" / "validation.cpp", "main": HERE / "main.cpp"}


def storage_of(x: Tensor) -> bytes:
    """Return the elements that a tensor spans in memory, and no others."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((last + 1,), (1,)).numpy().tobytes()


@dataclass
class Request:
    """A call of a kernel; the arrays are copied to the emulator."""

    name: str
    integers: Sequence[int]
    reals: Sequence[float] = ()
    arrays: Sequence[Tensor | None] = ()
    outputs: int = 1
    seed: int = 0

    def encode(self) -> bytes:
        arrays = [b"" if array is None else storage_of(array) for array in self.arrays]
        integers = (self.seed, *self.integers)
        lists = [map(int, integers), (repr(float(real)) for real in self.reals), map(len, arrays)]
        counts = [len(integers), len(self.reals), len(arrays)]
        words = [str(word) for count, values in zip(counts, lists, strict=True) for word in (count, *values)]
        return f"{self.name} {' '.join(words)}\n".encode() + b"".join(arrays)


def execute(program: Path, requests: Sequence[Request] = ()) -> list[list[bytes]]:
    """Run a program; return the outputs of each request.

    Raises:
        EmulationError: If the program fails, with its message.
    """
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    given = b"".join(request.encode() for request in requests)
    done = subprocess.run([program], input=given, capture_output=True, env=environment)
    if done.returncode:
        raise EmulationError(done.stderr.decode(errors="replace")[:4000])
    found: list[list[bytes]] = []
    data = done.stdout
    for request in requests:
        outputs = []
        for _ in range(request.outputs):
            size, data = data.split(b"\n", 1)
            outputs.append(data[: int(size)])
            data = data[int(size) :]
        found.append(outputs)
    return found


@pytest.fixture(scope="session")
def sanitizers() -> None:
    """Skip where C++ cannot be compiled with the address sanitizer, or has no fibers."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulation of CUDA needs Linux")
    command = [COMPILER, *FLAGS, "-x", "c++", "-", "-o", os.devnull]
    try:
        subprocess.run(command, input=b"int main() {}", check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{COMPILER} cannot compile with the address sanitizer")


@pytest.fixture(scope="session")
def emulate(sanitizers):
    """Return a function that runs requests, the fields of `Request` as dicts, on the kernels of csrc."""
    program = build(kernel_units())
    return lambda requests: execute(program, [Request(**fields) for fields in requests])


@pytest.fixture(scope="session")
def faults(sanitizers):
    """Return the program of faults.cu."""
    return build({"faults": to_cpp((HERE / "faults.cu").read_text())})


@pytest.fixture(scope="session")
def translate():
    """Return the function that turns CUDA C++ into C++."""
    return to_cpp
