"""The Triton kernels of views without a GPU: run in Triton's interpreter, and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

GRID = Path(__file__).with_name("views_triton_grid.py")


@pytest.fixture(scope="module")
def grid():
    """Number of cases and failures of each group."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(GRID)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("group", ["sizes", "rows", "out of range", "crops", "bad crops"])
def test_interpreted(grid, group):
    count, failures = grid[group]
    assert count > 0
    assert not failures


def compiled(kernel, constants, tile, options, capability, dtype, with_rows):
    """Return the PTX of a kernel whose pointers, and the ints with `line` in their name, are aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"images_ptr": "*u8", "ids_ptr": "*i64", "boxes_ptr": "*i32", "affine_ptr": "*fp32"}
    pointers |= {"out_ptr": f"*{dtype}", "rows_ptr": "*i64" if with_rows else "constexpr"}
    constants = constants | tile | ({} if with_rows else {"rows_ptr": None})
    names = [p.name for p in kernel.params]
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = [name for name in names if name not in constants and (name in pointers or "line" in name)]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("kernel", ["gather", "crop"])
def test_compiles_to_wide_stores_and_separate_roundings(capability, dtype, with_rows, kernel):
    from kdfast.ops.views import crops_triton, gather_triton

    if kernel == "gather":
        module, constants = gather_triton, {"FLIPS": 2}
        function = gather_triton.gather_views_kernel
    else:
        module, constants, function = crops_triton, {}, crops_triton.crop_views_kernel
    ptx = compiled(function, constants, module.TILE, module.OPTIONS, capability, dtype, with_rows)
    stores = [
        line.split()[1 if line.split()[0].startswith("@") else 0] for line in ptx.splitlines() if "st.global" in line
    ]
    assert stores
    assert all(".v4.b32" in store for store in stores)
    assert "fma." not in ptx
    assert "mul.rn.f32" in ptx or "mul.f32" in ptx
    assert ".local" not in ptx
