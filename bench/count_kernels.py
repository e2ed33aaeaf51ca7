"""Count the instructions of the Triton kernels, without a GPU, and what share of the copy bandwidth they allow at most.

    python bench/count_kernels.py [--arch 90] [--copy 4.3] [--tree DIR]
    python bench/count_kernels.py --compare BEFORE.json [AFTER.json]
    python bench/count_kernels.py --bounds [quick|all]

The first form compiles `kd_loss` with gradient for each number of classes, dtype and direction, prints a table and
writes bench/results/kernel_counts.json; --tree counts the kdfast in another folder, such as a worktree of an older
commit. The second compares two such files. The third compiles the quick or all cases and records the counts of the
installed Triton in tests/ops/triton_bounds.json: [instructions, trips] for sm_80 and sm_90. Instructions may exceed
them by 5% in tests/ops/test_triton_kernels.py, trips not at all.

`instr` counts the instructions of a thread for each element of the logits, `ALU` and `MUFU` those of two pipes,
`barriers` those that a thread meets, `trips` how often it waits for global memory before it can issue its next loads,
`loops` passes x instructions of each loop. `ceiling` is the memory traffic at perfect issue, in TB/s: an upper bound,
see bench/triton_compile/counts.py for its assumptions. `of copy` is its share of the copy bandwidth given by --copy,
and `of target` that share over the one that the kernel is meant to reach; since a kernel reaches perhaps 60% of its
ceiling, about 1.6 is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from harness import RESULTS, commit, table, write_results

BOUNDS = Path(__file__).parent.parent / "tests" / "ops" / "triton_bounds.json"
ARCHITECTURES = (80, 90)
TARGETS = {16384: 0.90, 65536: 0.75, 2**31: 0.55}  # share of the copy bandwidth to reach, by largest number of classes


def main() -> None:
    arguments = parse()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    if arguments.compare:
        compare(*[*arguments.compare, RESULTS / "kernel_counts.json"][:2])
        return
    if arguments.tree:
        use_tree(arguments.tree)
    if arguments.bounds:
        record_bounds(arguments.bounds)
        return
    import triton
    from triton_compile.cases import cases
    from triton_compile.rows import count_cases

    rows = [flat(row) for row in count_cases([case for case in cases() if case.table], arguments.arch)]
    print(table([{**row, **shares(row, arguments.copy)} for row in rows]))
    counted = commit(arguments.tree) if arguments.tree else commit()
    path = write_results("kernel_counts", rows, triton=triton.__version__, kernels=counted, arch=arguments.arch)
    print(f"\nwrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90, help="compute capability (default: 90)")
    parser.add_argument("--copy", type=float, default=4.3, help="copy bandwidth in TB/s (default: 4.3, an H200)")
    parser.add_argument("--tree", type=Path, help="folder with the kdfast to count (default: the installed one)")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="print the changes between two results")
    parser.add_argument(
        "--bounds", nargs="?", const="all", choices=("quick", "all"), help=f"record counts in {BOUNDS.name}"
    )
    return parser.parse_args()


def use_tree(tree: Path) -> None:
    """Import kdfast from a folder, even if an editable installation of another one directs its imports."""
    if not (tree / "kdfast" / "__init__.py").is_file():
        sys.exit(f"{tree} holds no kdfast/: pass a checkout")
    sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
    sys.path.insert(0, str(tree.resolve()))


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the table and the file say about a counted case."""
    c, dtype, direction = row["table"]
    return {
        "C": c,
        "dtype": dtype,
        "direction": direction,
        "tile": f"{row['tile'].get('ROWS', 1)}x{row['tile'].get('BLOCK', '?')}",
        "warps": row["warps"],
        "registers": row["registers"],
        "spilled": row["spilled"],
        "instr": row["instructions"],
        "ALU": row["pipes"].get("ALU", 0),
        "MUFU": row["pipes"].get("MUFU", 0),
        "barriers": row["barriers"],
        "trips": row["round_trips"],
        "loops": " ".join(f"{passes}x{size}" for size, passes in row["loops"]),
        "ceiling": row["ceiling"],
    }


def shares(row: dict[str, Any], copy: float) -> dict[str, str]:
    """Return the ceiling as a share of the copy bandwidth, the share to reach, and the ratio of both."""
    share = row["ceiling"] / copy
    target = next(share for most, share in TARGETS.items() if row["C"] <= most)
    return {"of copy": f"{share:.0%}", "target": f"{target:.0%}", "of target": f"{share / target:.2f}"}


def compare(*paths: Path) -> None:
    """Print what changed between two files."""
    before, after = (json.loads(path.read_text()) for path in paths)
    if before["arch"] != after["arch"]:
        sys.exit(f"the files are for sm_{before['arch']} and sm_{after['arch']}: compare two of the same --arch")
    print(table(compared(before["rows"], after["rows"])))


def compared(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table of changes: the cases that are in both results."""
    names = ("C", "dtype", "direction")
    old = {tuple(row[name] for name in names): row for row in before}
    rows = []
    for b in after:
        a = old.get(tuple(b[name] for name in names))
        if a is not None:
            changes = {
                name: f"{a[name]} > {b[name]}"
                for name in ("tile", "warps", "registers", "spilled", "instr", "ALU", "MUFU", "barriers", "ceiling")
            }
            rows.append({**{name: b[name] for name in names}, **changes, "ratio": f"{b['ceiling'] / a['ceiling']:.2f}"})
    return rows


def record_bounds(selection: str) -> None:
    """Replace the counts of the installed Triton, of the quick or of all cases, in the file of the bounds."""
    import triton
    from triton_compile.cases import cases
    from triton_compile.rows import count_cases

    known = list(cases())
    chosen = [case for case in known if selection == "all" or case.quick]
    columns = [count_cases(chosen, arch) for arch in ARCHITECTURES]
    counts = {
        rows[0]["case"]: [[row["instructions"], row["round_trips"]] for row in rows]
        for rows in zip(*columns, strict=True)
    }
    bounds = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    counts = {**bounds.get(triton.__version__, {}), **counts}
    bounds[triton.__version__] = {case.name: counts[case.name] for case in known if case.name in counts}
    lines = ",\n".join(
        f' "{version}": {{\n'
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in names.items())
        + "\n }"
        for version, names in sorted(bounds.items())
    )
    BOUNDS.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
