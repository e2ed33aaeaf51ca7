"""KD terms on a pruned CIFAR-100, the setting of Table 1 of Ben-Baruch et al. (ICML 2025): one resumable command.

    python bench/kd_terms.py --data cifar-100-python --teacher resnet32.pt --out runs/terms --epochs 60
    python bench/kd_terms.py --data cifar-100-python --teacher resnet32.pt --out runs/terms --rows none,kd,vid

A ResNet-32 teaches a ResNet-32 on the samples that were forgotten most often. All terms have weight 1, as have the
cross-entropy and the divergence (2 in the row kd, 0 in the row none), at temperature 4; SGD of RepDistiller, with the
learning rate divided at the same shares of the run. With fewer than 240 epochs, rows of the same number of epochs may
be compared with each other, and not with the paper's.

Finished rows are appended to bench/results/kd_terms.jsonl, and the table is made from that file (`--report` does only
this). The paper's figures in it are the paper's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import RESULTS, machine

KDFAST = [sys.executable, "-m", "kdfast"]
LOG = RESULTS / "kd_terms.jsonl"
TERMS = ("vid", "ab", "fitnets", "at", "ft", "fsp", "nst", "pkt", "rkd", "sp", "review")
ROWS = ("none", "kd", *TERMS)
PUBLISHED = {  # row: {fraction: top-1}, with a teacher of 71.6
    "none": {0.05: 14.46, 0.1: 22.21}, "kd": {0.05: 28.62, 0.1: 46.27}, "fitnets": {0.05: 25.66, 0.1: 44.84},
    "ab": {0.05: 30.5, 0.1: 47.68}, "at": {0.05: 28.26, 0.1: 42.59}, "ft": {0.05: 28.34, 0.1: 44.01},
    "fsp": {0.05: 27.62, 0.1: 37.16}, "nst": {0.05: 26.2, 0.1: 44.5}, "pkt": {0.05: 27.3, 0.1: 44.09},
    "rkd": {0.05: 21.69, 0.1: 43.03}, "sp": {0.05: 29.09, 0.1: 42.53}, "vid": {0.05: 32.5, 0.1: 49.46},
}  # fmt: skip


def run_kdfast(*arguments: object) -> None:
    """Print a command and run it."""
    words = [str(a) for a in arguments]
    print("$ kdfast " + shlex.join(words), flush=True)
    subprocess.run([*KDFAST, *words], check=True)


def prepare(options: argparse.Namespace) -> Path:
    """Import the teacher, record dynamics and choose the samples; return the subset."""
    data, out = ("--data", options.data), options.out
    if not (out / "teacher.pt").exists():
        statistics_of = ("--mean", "0.5071,0.4867,0.4408", "--std", "0.2675,0.2565,0.2761")
        run_kdfast(
            "teacher",
            "import",
            options.teacher,
            *data,
            "--net",
            "resnet32",
            *statistics_of,
            "--out",
            out / "teacher.pt",
        )
    dynamics = options.dynamics or out / "dyn"
    if not (dynamics / "manifest.json").exists():
        recipe = "--net resnet32 --epochs 30 --batch-size 128 --lr 0.1 --schedule cosine --precision auto"
        run_kdfast("dynamics", *data, *recipe.split(), "--out", dynamics)
    subset = out / f"forgetting-{options.fraction:g}.npy"
    if not subset.exists():
        flags = ("--method", "forgetting", "--dynamics", dynamics, "--fraction", options.fraction)
        run_kdfast("prune", *data, *flags, "--out", subset)
    return subset


def loss_flags(row: str) -> list[object]:
    """Return the flags of a row's loss."""
    if row == "none":
        return ["--alpha", 0]
    if row == "kd":
        return ["--ce-weight", 1, "--alpha", 2]
    return ["--ce-weight", 1, "--alpha", 1, "--kd-term", row, "--kd-weight", 1]


def train(options: argparse.Namespace, subset: Path, row: str, seed: int) -> dict[str, Any]:
    """Train one student, and return its row of the results file."""
    folder = options.out / f"{row}-{options.fraction:g}-{options.epochs}-{seed}"
    teacher = [] if row == "none" else ["--teacher", options.out / "teacher.pt"]
    run_kdfast(
        "distill", "--data", options.data, "--subset", subset, "--student", "resnet32", *teacher, *loss_flags(row),
        "--epochs", options.epochs, "--seed", seed, "--precision", "auto", "--out", folder,
    )  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    kept = ("test_top1", "steps", "seconds", "weights", "kept")
    place = {"row": row, "fraction": options.fraction, "epochs": options.epochs, "seed": seed}
    return {**place, **{name: result[name] for name in kept}, "machine": machine()}


def read_rows() -> list[dict[str, Any]]:
    """Return the rows of the results file."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return one markdown table for each fraction and number of epochs."""
    groups: dict[tuple[float, int], dict[str, list[float]]] = {}
    for row in rows:
        groups.setdefault((row["fraction"], row["epochs"]), {}).setdefault(row["row"], []).append(row["test_top1"])
    return "\n\n".join(_table(*key, members) for key, members in sorted(groups.items()))


def _table(fraction: float, epochs: int, top1: dict[str, list[float]]) -> str:
    lines = [f"{fraction:.0%} kept, {epochs} epochs", "", "| term | top-1 (seeds) | minus kd |", "|---|---|---|"]
    full = epochs == 240
    if full:
        lines[2:] = ["| term | top-1 (seeds) | minus kd | published | difference |", "|---|---|---|---|---|"]
    for row in ROWS:
        if row not in top1:
            continue
        mean = statistics.mean(top1[row])
        against = f"{mean - statistics.mean(top1['kd']):+.2f}" if "kd" in top1 and row != "kd" else ""
        cells = [row, f"{mean:.2f} ({len(top1[row])})", against]
        if full:
            paper = PUBLISHED.get(row, {}).get(fraction)
            cells += ["", ""] if paper is None else [f"{paper:.2f}", f"{mean - paper:+.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--teacher", help="checkpoint of a ResNet-32 to import")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dynamics", type=Path, help="recorded dynamics; default: record 30 epochs of a ResNet-32")
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--report", action="store_true", help="only print the tables")
    options = parser.parse_args()
    if not options.report:
        if not (options.data and options.teacher and options.out):
            parser.error("pass --data, --teacher and --out, or --report")
        options.out.mkdir(parents=True, exist_ok=True)
        subset = prepare(options)
        done = {(row["row"], row["fraction"], row["epochs"], row["seed"]) for row in read_rows()}
        for seed in range(options.seeds):
            for name in options.rows.split(","):
                if (name, options.fraction, options.epochs, seed) not in done:
                    row = train(options, subset, name, seed)
                    with LOG.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(read_rows()))


if __name__ == "__main__":
    main()
