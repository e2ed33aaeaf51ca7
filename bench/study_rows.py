"""Copy the rows of a study from the folder of `kdfast reproduce` to bench/results, without the paths of this machine.

    python bench/study_rows.py table1 --out runs/papers
    python bench/study_rows.py fig12 --out bench/results/gpu
    python bench/study_rows.py fig6 --out runs/closer --name fig6_closer_teacher

They replace those of bench/results/table1.jsonl and fig12.jsonl; a row there that the folder lacks stays. The second
command reads the results of bench/gpu.sh. Runs of another teacher have a file of their own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import RESULTS, read_rows

from kdfast.reproduction.report.results import digest_cell

FIELDS = (
    "study", "dataset", "cell", "seed", "epochs", "compressed_to", "kept", "alpha", "views", "targets", "precision",
    "teacher_top1", "test_top1", "test_top5", "steps", "images", "seconds", "torch",
)  # fmt: skip
_SAME = ("study", "seed", "epochs", "compressed_to", "targets", "precision", "label_smoothing")


def shorten(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a reader of a table needs of a row of `kdfast reproduce`."""
    machine = row["machine"]
    smoothing = row["settings"].get("label_smoothing", 0)
    return {name: row[name] for name in FIELDS} | {
        "label_smoothing": smoothing,
        "cpu": machine["device"],
        "threads": machine["threads"],
    }


def short_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of a results.jsonl of `kdfast reproduce` or of bench/gpu.sh."""
    if any("part" in row for row in rows):
        return [run for row in rows if row["part"] == "studies" for run in row.get("runs", ())]
    return [shorten(row) for row in rows]


def identity(row: dict[str, Any]) -> str:
    """Return what two rows of the same run share."""
    return json.dumps([digest_cell(row["cell"]), *(row[name] for name in _SAME)], sort_keys=True)


def main() -> None:
    """Merge the rows and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--out", type=Path, required=True, help="folder of `kdfast reproduce`")
    parser.add_argument("--name", help="name of the file; default: that of the study")
    arguments = parser.parse_args()
    path = RESULTS / f"{(arguments.name or arguments.study).replace('-', '_')}.jsonl"
    new = [row for row in short_rows(read_rows(arguments.out / "results.jsonl")) if row["study"] == arguments.study]
    rows = {identity(row): row for row in [*read_rows(path), *new]}
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows.values()))
    print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    main()
