"""kd_loss alone: time, and share of the bandwidth of a copy that is measured beside each row.

Each call moves at least 1.5 GB (CPU: a little), many times the L2 cache: student and teacher are read once, in random
order of the teacher's rows, and the gradient is written once. The output is checked against float64 first. `latency` is
one small batch as a step of training has it.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from harness import copy_bandwidth, device_timing
from torch import Tensor

import kdfast
from gpu.results import PartResults, measure_missing

ALPHA, TEMPERATURE = 0.5, 4.0
BYTES = {"cuda": 1.5e9, "cpu": 2e6}
COPY_BYTES = {"cuda": 1 << 32, "cpu": 1 << 24}
# Classes in the order of the targets; without one at 10.
CLASSES = {"cuda": (1000, 100, 32000, 131072, 8192, 262144, 10), "cpu": (100, 1000)}
DIVERGENCES = ("jsd", "dkd", "standardized")
TARGETS = {1000: 0.9, 32000: 0.75, 131072: 0.55}
TOP_K = 64
ROUNDS = {"cuda": 20, "cpu": 3}
PROCESSES = 12


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        dtype: Of the student's logits.
        c: Classes.
        direction: Of the divergence.
        top_k: Whether the teacher has its top classes alone.
        divergence: Its name.
        scaled: Whether the loss is multiplied before its backward pass, as a loss scaler does: the gradient is read and
            written once more.
    """

    dtype: str
    c: int
    direction: str = "forward"
    top_k: bool = False
    divergence: str = "kl"
    scaled: bool = False

    @property
    def key(self) -> str:
        """Name of the row."""
        what = self.direction if self.divergence == "kl" else self.divergence
        return f"{self.dtype} C={self.c} {what}{' top-k' * self.top_k}{' scaled' * self.scaled}"


def cases(device: str) -> list[Case]:
    """Return the measurements in the order of their worth."""
    classes = CLASSES[device]
    plain = [Case(dtype, c) for dtype in ("bfloat16", "float32") for c in classes]
    return [
        *plain,
        *(Case("bfloat16", c, scaled=True) for c in classes if c in (1000, 32000)),
        *(Case("bfloat16", c, "reverse") for c in classes if c in (1000, 32000)),
        *(Case("bfloat16", c, top_k=True) for c in classes if c in (1000, 131072)),
        *(Case("bfloat16", c, divergence=name) for c in classes if c in (100, 1000, 32000) for name in DIVERGENCES),
    ]


def row_bytes(case: Case) -> int:
    """Return the least traffic of a row: student, teacher and gradient, and the scaled gradient."""
    teacher = TOP_K * (2 + 4) if case.top_k else case.c * 2
    return case.c * (4 if case.scaled else 2) * getattr(torch, case.dtype).itemsize + teacher


def rows_of(case: Case, device: str) -> int:
    """Return the number of rows of a call that moves enough bytes."""
    return max(64, int(-(-BYTES[device] // row_bytes(case))))


def inputs(case: Case, device: str, n: int) -> dict[str, Any]:
    """Return the arguments of kd_loss for n rows."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    logits = torch.empty(n, case.c, device=device, dtype=dtype).normal_(0, 3).requires_grad_()
    labels = torch.randint(case.c, (n,), device=device)
    options = {"alpha": ALPHA, "temperature": TEMPERATURE, "direction": case.direction, "divergence": case.divergence}
    if case.top_k:
        few = torch.empty(min(n, 512), case.c, device=device).normal_(0, 3)
        part = kdfast.topk_teacher(few, TOP_K, temperature=TEMPERATURE)
        whole = [
            x.repeat(-(-n // len(x)), *[1] * (x.dim() - 1))[:n].contiguous()
            for x in (part.values.half(), part.classes, part.tail)
        ]
        return {"logits": logits, "labels": labels, "teacher": kdfast.TopKTeacher(*whole), **options}
    teacher = torch.empty(n, case.c, device=device, dtype=torch.float16).normal_(0, 3)
    return {"logits": logits, "labels": labels, "teacher": teacher, "rows": torch.randperm(n, device=device), **options}


def gradient_error(arguments: dict[str, Any]) -> float:
    """Return the error of the gradient of a few rows relative to the largest element, against float64."""
    few = 8
    given = {**arguments, "logits": arguments["logits"].detach()[:few], "labels": arguments["labels"][:few]}
    if "rows" in given:
        given["rows"] = given["rows"][:few]
    else:
        top = given["teacher"]
        given["teacher"] = kdfast.TopKTeacher(top.values[:few], top.classes[:few], top.tail[:few])
    found, exact = (
        gradient({**given, "logits": given["logits"].to(dtype).requires_grad_(), **extra}).double()
        for dtype, extra in ((given["logits"].dtype, {}), (torch.float64, {"backend": "reference"}))
    )
    return float((found - exact).abs().max() / exact.abs().max())


def checked_error(arguments: dict[str, Any]) -> float:
    """Return the error of the gradient; raise if it is more than rounding explains."""
    error = gradient_error(arguments)
    if not error < 4 * torch.finfo(arguments["logits"].dtype).eps + 1e-5:
        raise AssertionError(f"the gradient is wrong: relative error {error:.1e}")
    return error


def gradient(arguments: dict[str, Any], factor: Tensor | None = None) -> Tensor:
    """Forward and backward, of the loss times a factor."""
    return torch.autograd.grad(kdfast.kd_loss(**arguments), arguments["logits"], factor)[0]


def measure(case: Case, device: str) -> dict[str, Any]:
    """Return the values of one row."""
    n = rows_of(case, device)
    arguments = inputs(case, device, n)
    error = checked_error(arguments)
    traffic = n * row_bytes(case)
    copy = copy_bandwidth(COPY_BYTES[device], device)
    forward = device_timing(lambda: kdfast.kd_loss(**arguments), device, ROUNDS[device])
    factor = torch.full((), 1024.0, device=device) if case.scaled else None
    both = device_timing(lambda: gradient(arguments, factor), device, ROUNDS[device])
    return {
        "n": n,
        "error": error,
        "bytes": traffic,
        "copy_bytes_per_second": copy,
        "graph": forward.graph and both.graph,
        "forward_ms": forward.median * 1e3,
        "forward_share": n * row_bytes(replace(case, scaled=False)) / forward.median / copy,
        "forward_quartiles_ms": [x * 1e3 for x in forward.spread],
        "ms": both.median * 1e3,
        "share": traffic / both.median / copy,
        "quartiles_ms": [x * 1e3 for x in both.spread],
        "target": TARGETS.get(case.c),
    }


def latency(case: Case, device: str, n: int = 128) -> dict[str, Any]:
    """Return the time of forward and backward of one small batch."""
    arguments = inputs(case, device, n)
    both = device_timing(lambda: gradient(arguments), device, ROUNDS[device], calls=50)
    return {"n": n, "graph": both.graph, "microseconds": both.median * 1e6, "quartiles": [x * 1e6 for x in both.spread]}


def compile_part(device: str, first: int) -> None:
    """Compile the kernels of every PROCESSES-th case into Triton's cache."""
    for case in cases(device)[first::PROCESSES]:
        # Triton compiles another kernel where the number of rows is a multiple of 16.
        arguments = inputs(case, device, 64 + rows_of(case, device) % 16)
        gradient(arguments)
        gradient_error(arguments)


def compile_all(*program: str) -> None:
    """Run a program that compiles a share of its kernels PROCESSES times at once: a kernel takes seconds of one core.

    Its last argument is the number of the share.
    """
    command = [sys.executable, *program]
    for process in [subprocess.Popen([*command, str(first)]) for first in range(PROCESSES)]:
        process.wait()


def main() -> None:
    """Measure the cases without a row."""
    results = PartResults.from_environment()
    device = results.device
    todo = {case.key: partial(measure, case, device) for case in cases(device)}
    small = [case for case in cases(device) if case.c in (100, 1000) and not case.scaled]
    todo |= {f"latency {case.key}": partial(latency, case, device) for case in small}
    if device == "cuda" and not todo.keys() <= results.measured():
        compile_all("-m", "gpu.measure.kd_loss")
    measure_missing(results, todo)


if __name__ == "__main__":
    compile_part("cuda", int(sys.argv[1])) if sys.argv[1:] else main()
