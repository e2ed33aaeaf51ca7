"""Imports point down only: cli -> sweep -> report -> distill, prune -> dynamics -> teacher -> nets, data -> ops."""

import ast
from pathlib import Path

import pytest

import kdfast

ROOT = Path(kdfast.__file__).parent
# Lower may not import higher; distill and prune, and nets and data, do not know each other.
LAYER = {
    "errors": 0,
    "files": 1,
    "device": 1,
    "ops": 2,
    "nets": 3,
    "data": 3,
    "teacher": 4,
    "dynamics": 5,
    "prune": 6,
    "distill": 6,
    "report": 7,
    "sweep": 8,
    "cli": 9,
    "examples": 9,
    "__main__": 10,
}
# A model carries its input normalisation, which is a type of the data layer.
SIDEWAYS = {("nets", "data")}
MODULES = sorted(ROOT.rglob("*.py"))


# The compiled extension lies below everything; the package itself holds only the version and the lazy public names.
BELOW = {"_native", "__version__", ""}


def part_of(dotted: str) -> str:
    names = dotted.split(".")
    return names[1] if len(names) > 1 else ""


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kdfast":
            if node.module == "kdfast":
                found |= {alias.name for alias in node.names}
            else:
                found.add(part_of(node.module))
        elif isinstance(node, ast.Import):
            found |= {part_of(a.name) for a in node.names if a.name.split(".")[0] == "kdfast"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(ROOT)
    own = relative.parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for part in imported_parts(path) - {own} - BELOW:
        assert part in LAYER, f"{relative} imports the unknown part {part!r}"
        allowed = LAYER[part] < LAYER[own] or (own, part) in SIDEWAYS
        assert allowed, f"{relative} ({own}) may not import {part}"


def test_every_part_has_a_layer() -> None:
    parts = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in MODULES} - {"__init__"}
    assert parts == set(LAYER)


@pytest.mark.parametrize(("package", "only_importer"), [("ffcv", "data/ffcv/read.py"), ("_native", "ops/native.py")])
def test_single_importer(package: str, only_importer: str) -> None:
    importers = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            if any(name.split(".")[-1 if package == "_native" else 0] == package for name in names):
                importers.add(path.relative_to(ROOT).as_posix())
    assert importers == {only_importer}
