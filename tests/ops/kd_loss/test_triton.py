"""Triton kernels without a GPU: run in Triton's interpreter in a subprocess, and compiled for sm_90."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

GRID = Path(__file__).with_name("triton_grid.py")
BASE = {
    "USE_CE": True,
    "REVERSE": False,
    "POWER": 2,
    "GRAD": True,
    "HAS_LABELS": True,
    "HAS_ROWS": True,
    "HAS_WEIGHTS": True,
    "HAS_MASS": True,
}
POINTERS = {
    "ids_ptr": "*i32",
    "marks_ptr": "*i64",
    "label_ptr": "*i64",
    "rows_ptr": "*i64",
    "tail_ptr": "*fp32",
    "weights_ptr": "*fp32",
    "mass_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "loss_ptr": "*fp32",
    "factor_ptr": "*fp32",
}
FLOATS = {"temperature", "ce_factor", "kl_factor", "grad_scale", "scale", "ce_slope", "kl_slope"}


def run_grid(*groups):
    """Return the number of checks and the failures of each group of cases, by name."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(GRID), "cpu", *groups]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# Functions of the grid that one process runs, and the groups of their cases.
PARTS = [
    (["dense"], {"dense"}),
    (
        ["options", "strides", "distant_columns", "rows_at_a_page_end", "masked", "large", "ties"],
        {"options", "strides", "masked", "large", "ties"},
    ),
    (["topk", "topk_shapes", "topk_edges"], {"topk", "topk shapes", "topk edges"}),
    (
        ["far", "ignored", "out_of_range", "class_id_after_the_last_class", "scaling", "weights"],
        {"far", "ignored", "out of range", "scaling", "weights"},
    ),
]


@pytest.mark.parametrize(("functions", "groups"), PARTS, ids=[names[0] for names, _ in PARTS])
def test_interpreted(functions, groups):
    found = run_grid(*functions)
    assert found.keys() == groups
    for count, failures in found.values():
        assert count > 0
        assert not failures, failures[:10]


def test_every_function_of_the_grid_is_interpreted():
    (functions,) = re.findall(r"^ALL = \((.*?)\)", GRID.read_text(), re.DOTALL | re.MULTILINE)
    assert sorted(re.findall(r"\w+", functions)) == sorted(name for names, _ in PARTS for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["dense", "topk"])
def test_interpreted_with_all_temperatures(monkeypatch, group):
    monkeypatch.setenv("KDFAST_ALL_CASES", "1")
    count, failures = run_grid(group)[group]
    assert count > 130
    assert not failures, failures[:10]


def compiled(kernel, warps, types, **constants):
    """Return a kernel's PTX for sm_90, specialized as for contiguous rows of a multiple of 16 elements."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants |= {name: 1 for name in ("z_col", "t_col", "v_col", "label_stride", "rows_stride")}
    constants |= {"alphas_ptr": None, "temperatures_ptr": None, "smoothing": None, "T_SQUARED": False}
    names = [p.name for p in kernel.params]
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = types.get(name) or POINTERS[name]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    given = [name for name in names if name not in constants]
    aligned = [name for name in given if name.endswith("_ptr") or name in ("c", "z_row", "t_row")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("student", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize("classes", [16, 128, 1024, 16384, 32000])
def test_dense_kernel_compiles_to_vectors_of_16_bytes(student, classes):
    """Teacher logits of half the size of the student's come in vectors of 8 bytes."""
    from kdfast.ops.kd_loss.triton.dense import dense_kernel
    from kdfast.ops.kd_loss.triton.tiles import tile_shape

    for reverse in (False, True):
        shape = tile_shape(classes, 4 if student == "*fp32" else 8, reverse)
        warps = shape.pop("num_warps")
        types = {"z_ptr": student, "grad_ptr": student, "t_ptr": "*fp16"}
        flags = {**BASE, "USE_KL": True, "REVERSE": reverse, "WIDE": False, "ALIGN": 16}
        ptx = compiled(dense_kernel, warps, types, **flags, **shape)
        tiles = [
            line for line in ptx.splitlines() if ".global" in line and "L1::evict" in line and "prefetch" not in line
        ]
        assert any("st.global" in line for line in tiles)
        narrow = [line for line in tiles if ".v4.b32" not in line]
        assert bool(narrow) == (student == "*fp32")
        assert all("ld.global" in line and ".v2.b32" in line for line in narrow)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("student", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize("classes", [1008, 16384, 32000, 131072])
def test_topk_kernel_compiles_to_vectors_of_16_bytes(student, classes):
    from kdfast.ops.kd_loss.triton.topk import topk_kernel, topk_shape

    shape = topk_shape(classes, 10, 4 if student == "*fp32" else 2, 16)
    warps = shape.pop("num_warps")
    types = {"z_ptr": student, "grad_ptr": student, "v_ptr": "*fp16"}
    for reverse in (False, True):
        flags = {**BASE, "REVERSE": reverse, "WIDE": False, "ALIGN": 16}
        ptx = compiled(topk_kernel, warps, types, **flags, **shape)
        for access in ("ld", "st"):
            assert any(f"{access}.global" in line and ".v4.b32" in line for line in ptx.splitlines())


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_other_kernels_compile():
    from kdfast.ops.triton_rows import scale_kernel, scale_rows_kernel, weight_sum_kernel

    types = {"z_ptr": "*bf16", "grad_ptr": "*bf16", "out_ptr": "*bf16", "v_ptr": "*fp16"}
    for kernel, flags in (
        (scale_kernel, {"IN_PLACE": True, "BLOCK": 8192}),
        (scale_kernel, {"IN_PLACE": False, "BLOCK": 8192}),
        (scale_rows_kernel, {"ALIGN": 8, "ROWS": 8, "COLUMNS": 1024}),
    ):
        ptx = compiled(kernel, 8, types, **flags)
        for access in ("ld", "st"):
            assert any(f"{access}.global" in line and ".v4.b32" in line for line in ptx.splitlines())
    assert compiled(weight_sum_kernel, 4, types, HAS_LABELS=True, HAS_WEIGHTS=True, BLOCK=1024)


@pytest.mark.parametrize("vector", [1, 2, 4, 8])
@pytest.mark.parametrize("reverse", [False, True])
def test_tiles_cover_a_row_once(vector, reverse):
    from kdfast.ops.kd_loss.triton.tiles import tile_shape

    for c in (1, 10, 100, 256, 1000, 4104, 8192, 16384, 16385, 50257, 262144):
        if c % vector == 0:
            shape = tile_shape(c, vector, reverse)
            rows, lanes, steps = shape["ROWS"], shape["LANES"], shape["STEPS"]
            width = lanes * shape["VECTOR"]
            before_last = (shape["TILES"] - 1) * steps * width
            assert before_last + (shape["LAST_STEPS"] - 1) * width < c <= before_last + shape["LAST_STEPS"] * width
            assert before_last + shape["LAST_FULL"] * width <= c
            assert shape["LAST_STEPS"] <= steps
            assert steps * shape["VECTOR"] <= 32
            assert rows * lanes == 32 * shape["num_warps"]
            assert (shape["TILES"] == 1) == (c <= (4096 if reverse else 8192))
            swept = tile_shape(c, vector, reverse, 16)
            if shape["TILES"] == 1:
                assert swept == shape
            else:
                assert (swept["LANES"], swept["STEPS"]) == (lanes, steps // 2)
                before_last = (swept["TILES"] - 1) * swept["STEPS"] * width
                assert 0 < c - before_last <= swept["LAST_STEPS"] * width < (swept["STEPS"] + 1) * width


def test_wide_offsets_and_alignment():
    from kdfast.ops.kd_loss.triton.launch import _alignment, _needs_wide_offsets

    wide = torch.empty_strided((4, 2**16), (1, 2**15), device="meta")
    assert _needs_wide_offsets(torch.zeros(4, 8), wide)
    assert not _needs_wide_offsets(torch.zeros(4, 8))
    assert _alignment(torch.zeros(4, 100), torch.zeros(4, 100)) == 4
    assert _alignment(torch.zeros(4, 48)[:, :32], torch.zeros(4, 32)) == 16
    assert _alignment(torch.zeros(4, 33)[:, :32]) == 1
