"""Time kd_loss with other tile shapes than those of `tile_shape`, on a GPU.

    python bench/tile_shapes.py [--classes 100,1000] [--out FILE]

A shape is ROWS x LANES x VECTOR x STEPS and the number of warps, see kdfast/ops/kd_loss/triton/tiles.py. Each call
moves 1.5 GB, as in bench/gpu/measure/kd_loss.py, and its gradient is checked first. Several processes compile the
kernels before the first is timed. Appends one row a shape to bench/results/tile_shapes.jsonl.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu.measure.kd_loss import BYTES, PROCESSES, Case, checked_error, compile_all, gradient, inputs, row_bytes
from gpu.results import append_row
from harness import RESULTS, commit, copy_bandwidth, device_timing

from kdfast.ops.kd_loss.triton import launch

_ROUNDS = 9
_FEW_ROWS = 4096  # for a call that only compiles


@dataclass(frozen=True)
class Shape:
    """A tile: rows and threads of a row, elements that a thread has of it, and the limit of registers a thread."""

    classes: int
    rows: int
    lanes: int
    vector: int
    steps: int
    warps: int
    registers: int | None = None

    def arguments(self) -> dict[str, int]:
        """Return what `tile_shape` returns."""
        width = self.lanes * self.vector
        tiles = -(-self.classes // (self.steps * width))
        last = self.classes - (tiles - 1) * self.steps * width
        found = {
            "ROWS": self.rows, "LANES": self.lanes, "VECTOR": self.vector, "STEPS": self.steps, "TILES": tiles,
            "LAST_STEPS": -(-last // width), "LAST_FULL": last // width if self.rows == 1 else 0,
            "num_warps": self.warps,
        }  # fmt: skip
        return found if self.registers is None else {**found, "maxnreg": self.registers}


SHAPES = [
    *(Shape(1000, 1, 32, 8, 4, 1, registers) for registers in (None, 64, 80, 96, 112)),
    Shape(1000, 1, 64, 8, 2, 2), Shape(1000, 1, 64, 8, 2, 2, 64), Shape(1000, 1, 128, 8, 1, 4),
    *(Shape(1000, warps, 32, 8, 4, warps) for warps in (2, 4, 8)),
    Shape(1000, 4, 64, 8, 2, 8), Shape(1000, 2, 128, 8, 1, 8), Shape(1000, 1, 32, 8, 2, 1), Shape(1000, 1, 64, 8, 1, 2),
    *(Shape(100, 32 // lanes * warps, lanes, 4, 32 // lanes, warps) for lanes in (4, 8, 16, 32) for warps in (1, 4, 8)),
    *(Shape(100, rows, 32, 4, 1, warps) for rows, warps in ((4, 1), (8, 1), (16, 4), (32, 8))),
    *(Shape(100, rows, 16, 4, 2, warps) for rows, warps in ((8, 1), (32, 4))),
    Shape(10, 16, 2, 2, 16, 1), Shape(10, 32, 1, 2, 8, 1), Shape(10, 128, 1, 2, 8, 4), Shape(10, 64, 2, 2, 4, 4),
    Shape(10, 16, 8, 2, 1, 4), Shape(10, 64, 8, 2, 1, 4), Shape(10, 32, 8, 2, 1, 1),
    *(Shape(8192, 1, 256, 8, 4, 8, registers) for registers in (None, 64, 80)),
    Shape(8192, 1, 512, 8, 2, 16), Shape(8192, 1, 1024, 8, 1, 32),
    *(Shape(32000, 1, 256, 8, 4, 8, registers) for registers in (128, None, 80)), Shape(32000, 1, 512, 8, 4, 16),
    Shape(32000, 1, 512, 8, 2, 16), Shape(32000, 1, 256, 8, 2, 8), Shape(32000, 1, 1024, 8, 2, 32),
    *(Shape(131072, 1, lanes, 8, 4, lanes // 32) for lanes in (256, 512, 1024)),
]  # fmt: skip


def use(shape: Shape) -> None:
    """Launch all kernels with a shape."""
    launch.tile_shape = lambda *_, **__: shape.arguments()
    launch._tuned.cache_clear()


def measure(shape: Shape, copy: float) -> dict[str, Any]:
    """Return the row of a shape."""
    use(shape)
    case = Case("bfloat16", shape.classes)
    n = int(BYTES["cuda"] // row_bytes(case)) // 16 * 16
    arguments = inputs(case, "cuda", n)
    error = checked_error(arguments)
    timing = device_timing(lambda: gradient(arguments), "cuda", _ROUNDS)
    rate = n * row_bytes(case) / timing.median
    return {"error": error, "ms": timing.median * 1e3, "bytes_per_second": rate, "share": rate / copy}


def main() -> None:
    """Time the shapes and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default=",".join(map(str, dict.fromkeys(shape.classes for shape in SHAPES))))
    parser.add_argument("--out", type=Path, default=RESULTS / "tile_shapes.jsonl")
    parser.add_argument("--compile", type=int, metavar="K", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted = [int(c) for c in options.classes.split(",")]
    shapes = [shape for shape in SHAPES if shape.classes in wanted]
    if options.compile is not None:
        for shape in shapes[options.compile :: PROCESSES]:
            use(shape)
            arguments = inputs(Case("bfloat16", shape.classes), "cuda", _FEW_ROWS)
            gradient(arguments)
            checked_error(arguments)
        return
    compile_all(__file__, "--classes", options.classes, "--compile")
    copy = copy_bandwidth(device="cuda")
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit()}
    for shape in shapes:
        row = {"shape": vars(shape), **measure(shape, copy), "copy_bytes_per_second": copy, **facts}
        append_row(options.out, row)
        print(f"{shape}: {row['bytes_per_second'] / 1e12:.2f} TB/s, {row['share']:.0%} of a copy", flush=True)


if __name__ == "__main__":
    main()
