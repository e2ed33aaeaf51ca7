"""Imports point down only: cli, reproduction, sweep, report, distillation and pruning, dynamics, teacher, ..., ops."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kdfast

ROOT = Path(kdfast.__file__).parent
# A part imports only parts with a lower number: distillation and pruning, and nets and data, do not import each other.
LAYER = {
    "errors": 0,
    "text": 0,
    "progress": 0,
    "trackers": 2,
    "files": 1,
    "device": 1,
    "distributed": 1,
    "ops": 2,
    "nets": 3,
    "data": 3,
    "teacher": 4,
    "dynamics": 5,
    "pruning": 6,
    "distillation": 6,
    "report": 7,
    "deploy": 7,
    "estimates": 7,
    "api": 8,
    "planning": 8,
    "sweep": 8,
    "reproduction": 9,
    "cli": 10,
    "examples": 10,
    "__main__": 11,
}
# A model includes its input normalization, whose type is in the data layer.
SIDEWAYS = {("nets", "data")}
MODULES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = sorted({path.parent for path in MODULES} - {ROOT})


# The compiled extension is below everything; the package itself holds only the version and the lazy public names.
BELOW = {"_native", "__version__", ""}
MAX_ENTRIES = 14  # files and folders in a package, with __init__.py
MAX_BODY = 75  # lines of a function below its signature and docstring; Triton kernels are the longest


def part_of(dotted: str) -> str:
    names = dotted.split(".")
    return names[1] if len(names) > 1 else ""


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kdfast":
            if node.module == "kdfast":
                found |= {alias.name for alias in node.names}
            else:
                found.add(part_of(node.module))
        elif isinstance(node, ast.Import):
            found |= {part_of(a.name) for a in node.names if a.name.split(".")[0] == "kdfast"}
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ALL_NAMES = {module_name(path) for path in MODULES}


def imported_modules(path: Path) -> set[str]:
    """Modules that a file imports at its top level, by their full names."""
    found = set()
    for node in MODULES[path].body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kdfast":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & ALL_NAMES or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_point_down() -> None:
    faults = []
    for path in MODULES:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own != "__init__":
            for part in imported_parts(path) - {own} - BELOW:
                if part not in LAYER:
                    faults.append(f"{path.relative_to(ROOT)} imports {part!r}, which has no layer")
                elif not (LAYER[part] < LAYER[own] or (own, part) in SIDEWAYS):
                    faults.append(f"{path.relative_to(ROOT)} ({own}) may not import {part}")
    assert not faults, "\n".join(faults)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    names = {module_name(path): path for path in MODULES}
    graph = {name: imported_modules(path) & set(names) - {name} for name, path in names.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_packages_stay_small() -> None:
    sizes = {
        package.relative_to(ROOT.parent).as_posix(): sum(
            entry.suffix == ".py" or (entry / "__init__.py").is_file() for entry in package.iterdir()
        )
        for package in PACKAGES
    }
    assert not {name: size for name, size in sizes.items() if size > MAX_ENTRIES}


def test_functions_stay_short() -> None:
    long = {}
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if lines > MAX_BODY:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    assert not long


def test_every_part_has_a_layer() -> None:
    parts = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in MODULES} - {"__init__"}
    assert parts == set(LAYER)


@pytest.mark.parametrize(("package", "only_importer"), [("ffcv", "data/ffcv/read.py"), ("_native", "ops/native.py")])
def test_single_importer(package: str, only_importer: str) -> None:
    importers = set()
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            if any(name.split(".")[-1 if package == "_native" else 0] == package for name in names):
                importers.add(path.relative_to(ROOT).as_posix())
    assert importers == {only_importer}
