"""Every Triton kernel compiles for sm_80 and sm_90 without spills, loads vectors, and issues and waits little.

The kernels are compiled in a process of its own, see bench/triton_compile; nothing runs, and no GPU is needed.
"""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kdfast

pytest.importorskip("triton")

BENCH = Path(__file__).parents[2] / "bench"
BOUNDS = Path(__file__).with_name("triton_bounds.json")  # written by bench/count_kernels.py --bounds
SLACK = 1.05


def triton_compile(*arguments):
    """Run bench/triton_compile and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_compile", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=BENCH, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def narrow(row):
    """Return the arguments that are loaded or stored in smaller pieces than their alignment allows."""
    found = {name: row["widths"].get(name, 0) for name in row["expected_widths"]}
    return {name: found[name] for name, expected in row["expected_widths"].items() if found[name] < expected}


def bounds(version):
    """Return the most instructions an element and round trips to memory of each case, by architecture.

    A Triton that was never measured has no bounds.
    """
    recorded = json.loads(BOUNDS.read_text())
    if version not in recorded:
        return {}
    largest = {}
    for counts in recorded.values():
        for case, pairs in counts.items():
            for arch, (instructions, trips) in zip((80, 90), pairs, strict=True):
                most = largest.get((case, arch), (0, 0))
                largest[case, arch] = max(most[0], SLACK * instructions), max(most[1], trips)
    return largest


def test_every_kernel_has_a_quick_case():
    found = triton_compile("list")
    assert found["launched"] == found["counted"]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("selection", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_kernels_stay_within_their_bounds(selection, arch):
    result = triton_compile(selection, str(arch))
    most = bounds(result["triton"])
    faults = []
    for row in result["rows"]:
        # Cases that are not quick may have no bound yet.
        allowed, trips = most.get((row["case"], arch), [0 if selection == "quick" else math.inf] * 2)
        if row["spilled"]:
            faults.append(f"{row['case']}: {row['spilled']} bytes spilled")
        if narrow(row):
            faults.append(f"{row['case']}: narrow {narrow(row)}, expected {row['expected_widths']}")
        if row["unknown_branches"] > row["data_branches"]:
            faults.append(f"{row['case']}: {row['unknown_branches']} branches could not be followed")
        if most and row["instructions"] > allowed:
            faults.append(f"{row['case']}: {row['instructions']} instructions, at most {allowed}")
        if most and row["round_trips"] > trips:
            faults.append(f"{row['case']}: waits {row['round_trips']} times for memory, at most {trips}")
    assert result["rows"]
    assert not faults, "\n".join(faults)


def returns_none(function):
    """Return whether a function returns None, or a name that it sets to None, alone or in a tuple."""
    none = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for names, value in ((node.targets[0], node.value),)
        for target, given in (
            zip(names.elts, value.elts, strict=True)
            if isinstance(names, ast.Tuple) and isinstance(value, ast.Tuple)
            else ((names, value),)
        )
        if isinstance(target, ast.Name) and isinstance(given, ast.Constant) and given.value is None
    }
    returned = [
        value
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and node.value is not None
        for value in (node.value.elts if isinstance(node.value, ast.Tuple) else [node.value])
    ]
    return any(
        (isinstance(value, ast.Constant) and value.value is None) or (isinstance(value, ast.Name) and value.id in none)
        for value in returned
    )


def kernel_modules():
    """Return the syntax trees of the modules that use Triton's language, by path."""
    root = Path(kdfast.__file__).parent
    sources = {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*.py"))}
    return {path: ast.parse(source) for path, source in sources.items() if "triton.language" in source}


MODULES = kernel_modules()


def jit_functions():
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in {ast.unparse(d) for d in node.decorator_list}:
                yield pytest.param(node, id=f"{path}:{node.name}")


@pytest.mark.parametrize("function", [*jit_functions()])
def test_functions_of_kernels_do_not_return_none(function):
    # Triton 3.6, which comes with PyTorch 2.11, does not compile it; the installed Triton may.
    assert not returns_none(function)


class NumPyLanguage:
    """What the functions that combine two elements of a reduction use of Triton's language."""

    where, maximum, minimum = staticmethod(np.where), staticmethod(np.maximum), staticmethod(np.minimum)


def reductions():
    """Yield the functions that kernels pass to tl.reduce, as functions of NumPy arrays."""
    used = {
        ast.unparse(node.args[2])
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.reduce"
    }
    for node in (node for tree in MODULES.values() for node in tree.body):
        if isinstance(node, ast.FunctionDef) and node.name in used:
            used.remove(node.name)
            node.decorator_list = []
            scope = {"tl": NumPyLanguage, "NEG_INF": -math.inf}
            exec(ast.unparse(node), scope)
            yield pytest.param(scope[node.name], len(node.args.args) // 2, id=node.name)
    assert not used, f"not found: {used}"


@pytest.mark.parametrize(("combine", "elements"), [*reductions()])
def test_threads_that_exchange_elements_combine_them_alike(combine, elements):
    # On a GPU each thread passes its own elements first; the interpreter, which runs the kernels in other tests, has
    # one order. Few values, so that elements are often equal.
    own, other = np.random.default_rng(0).integers(-2, 3, (2, elements, 1000)).astype(np.float32) / 3
    for ours, theirs in zip(combine(*own, *other), combine(*other, *own), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_reduction_that_keeps_the_own_element_of_two_equal_ones_is_found():
    def first_of_equals(z, origin, other_z, other_origin):
        return np.maximum(z, other_z), np.where(other_z > z, other_origin, origin)

    with pytest.raises(AssertionError):
        test_threads_that_exchange_elements_combine_them_alike(first_of_equals, 2)


def test_a_returned_none_is_found():
    source = "def f(x):\n    a, b = x, None\n    if x:\n        a, b = g(x)\n    return a, b"
    assert returns_none(ast.parse(source).body[0])
    assert not returns_none(ast.parse("def f(x):\n    b = None\n    return x, g(b)").body[0])
