"""Students on subsets by every way of choosing them, and on all data: one resumable command, one table.

    python bench/selection_students.py cifar10 --data cifar-10-batches-py --teacher resnet56.th --out runs/cifar10
    python bench/selection_students.py cifar100 --data cifar-100-python --teacher resnet32.pt --out runs/cifar100
    python bench/selection_students.py cifar10 ... --student resnet20 --seeds 3
    python bench/selection_students.py cifar10 ... --full --seeds 2

Each step is a `kdfast` command, printed before it runs: the teacher is imported, cached on 5 views and flattened; a
ResNet-20 is trained for the dynamics, and a ResNet-8 for 20 epochs of a random tenth, for the windows of BWS (in the
features of the teacher, which fits its training split, all windows are alike). Then every method chooses subsets, and
students train on them with the teacher for the same number of steps. Seeds come one after another, so that an
interrupted command leaves whole comparisons. Two rows have all data: for the same steps, and for the same epochs as the
subset. `--full` trains for 240 epochs of a tenth, the recipe of RepDistiller, and only the methods of `FULL`.

The rows with all data for the same epochs are long: only the first `--long-seeds` have them.

Finished rows are appended to bench/results/selection_students.jsonl; the table shows means, standard deviations and
95% intervals of the paired difference from random, or from `--baseline`. `--report` only prints the tables of that
file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, read_rows, run_kdfast

from kdfast.sweep.summary import half_width

LOG = RESULTS / "selection_students.jsonl"
BATCH = 64
FRACTIONS = (0.1, 0.3, 0.5)
SHORT_STEPS = 1250
FULL_EPOCHS, FULL_FRACTION = 240, 0.1

EL2N = "el2n:use=dynamics,epochs=1..10"
BWS = EL2N + "/bws:start={start}"
METHODS = (
    "random",
    "if-beta:preset=paper,score=fvm",
    "if-beta",
    "dual",
    "ccs",
    "d2:use=dynamics",
    BWS,
    "medium",
    "moderate:use=cache",
    EL2N,
)
FULL = ("random", "if-beta:preset=paper,score=fvm", "if-beta", "dual")
ALL_STEPS, ALL_EPOCHS = "all data, the same steps", "all data, the same epochs"


@dataclass(frozen=True)
class Preset:
    """A data set: its size, the teacher's network, and the flags of its import."""

    samples: int
    teacher_net: str
    teacher_flags: str


PRESETS = {
    "cifar10": Preset(50_000, "resnet56a", "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"),
    "cifar100": Preset(50_000, "resnet32", "--mean 0.5071,0.4867,0.4408 --std 0.2675,0.2565,0.2761"),
}


@dataclass(frozen=True)
class Paths:
    """Files of one data set, made once and shared by all students."""

    data: str
    out: Path

    @property
    def teacher(self) -> Path:
        """The imported teacher."""
        return self.out / "teacher.pt"

    @property
    def inputs(self) -> tuple[str, ...]:
        """What every sweep reads."""
        scores = f"fvm={self.out / 'fvm.npz'}"
        return ("--data", self.data, "--cache", f"{self.out / 'cache'}", "--dynamics", f"{self.out / 'dyn'}",
                "--scores", scores)  # fmt: skip


def prepare(preset: Preset, checkpoint: str, paths: Paths) -> None:
    """Make the teacher, its cache, the dynamics and the scores; what is finished is kept."""
    data, out = ("--data", paths.data), paths.out
    if not paths.teacher.exists():
        flags = preset.teacher_flags.split()
        run_kdfast("teacher", "import", checkpoint, *data, "--net", preset.teacher_net, "--out", paths.teacher, *flags)
    if not (out / "cache" / "manifest.json").exists():
        run_kdfast(
            "cache", *data, "--teacher", paths.teacher, "--views", 5, "--precision", "auto", "--out", out / "cache"
        )
    if not (out / "dyn" / "manifest.json").exists():
        recipe = (
            "--net resnet20 --epochs 30 --batch-size 128 --lr 0.1 --schedule cosine --precision auto --record batch"
        )
        run_kdfast("dynamics", *data, *recipe.split(), "--out", out / "dyn")
    if not (out / "flat.pt").exists():
        run_kdfast("teacher", "flatten", *data, "--teacher", paths.teacher, "--out", out / "flat.pt")
    if not (out / "fvm.npz").exists():
        flags = ("--method", "influence-fvm", "--teacher", out / "flat.pt")
        run_kdfast("score", *data, *flags, "--out", out / "fvm.npz")


def best_window(paths: Paths, fraction: float) -> float:
    """Return the start of BWS's window, chosen with the features of a network that is trained briefly."""
    data, out = ("--data", paths.data), paths.out / "bws"
    out.mkdir(exist_ok=True)
    if not (out / "cache" / "manifest.json").exists():
        subset = out / "random.npy"
        run_kdfast("prune", *data, "--method", "random", "--fraction", 0.1, "--out", subset)
        flags = ("--student", "resnet8", "--alpha", 0, "--epochs", 20, "--precision", "auto")
        run_kdfast("distill", *data, "--subset", subset, *flags, "--out", out / "short")
        run_kdfast("cache", *data, "--teacher", out / "short" / "student.pt", "--views", 1, "--out", out / "cache")
    chosen = out / f"idx-{fraction:g}.npy"
    if not chosen.exists():
        score = ("--method", "el2n", "--score-option", "use=dynamics", "--score-option", "epochs=1..10")
        inputs = ("--dynamics", paths.out / "dyn", "--cache", out / "cache")
        run_kdfast("prune", *data, *inputs, *score, "--rule", "bws", "--fraction", fraction, "--out", chosen)
    provenance = json.loads(chosen.with_suffix(".json").read_text())
    return float(provenance["parameters"]["options"]["start"])


def sweep(
    paths: Paths, name: str, student: str, methods: str, fraction: float, steps: int, seed: int, full: bool
) -> None:
    """Train the students of some methods at one fraction and seed."""
    recipe = "--lr 0.05 --schedule step" if full else "--lr 0.1 --schedule cosine"
    run_kdfast(
        "sweep", *paths.inputs, "--student", student, "--kd", "on", "--methods", methods, "--fractions", fraction,
        "--seeds", seed, "--steps", steps, "--batch-size", BATCH, *recipe.split(), "--precision", "auto",
        "--out", paths.out / name,
    )  # fmt: skip


def train_all(
    preset: Preset, paths: Paths, student: str, seeds: int, long_seeds: int, full: bool
) -> Iterator[dict[str, Any]]:
    """Train every student that is missing, and yield the rows of the results file."""
    fractions = (FULL_FRACTION,) if full else FRACTIONS
    methods = FULL if full else METHODS
    kind = "full" if full else "short"
    whole = math.ceil(preset.samples / BATCH)
    for seed in range(seeds):
        for fraction in fractions:
            per_epoch = math.ceil(round(fraction * preset.samples) / BATCH)
            epochs = FULL_EPOCHS if full else max(1, round(SHORT_STEPS / per_epoch))
            steps = epochs * per_epoch
            names = ",".join(methods)
            if BWS in methods:
                names = names.replace(BWS, BWS.format(start=best_window(paths, fraction)))
            plan = {
                f"{kind}-{student}": (names, fraction, steps),
                f"{kind}-{student}-all-{steps}": ("random", 1.0, steps),
            }
            # All data for 240 epochs takes ten times as long as the rest together.
            if not full and seed < long_seeds:
                plan[f"{kind}-{student}-all-{epochs}-epochs"] = ("random", 1.0, epochs * whole)
            for name, (which, share, count) in plan.items():
                sweep(paths, name, student, which, share, count, seed, full)
                label = None if share < 1 else ALL_STEPS if count == steps else ALL_EPOCHS
                for row in read_rows(paths.out / name / "results.jsonl"):
                    if (row["seed"], row["fraction"], row["steps"]) == (seed, share, count):
                        method = label or (BWS.split(":start")[0] if "/bws" in row["method"] else row["method"])
                        yield {**row, "method": method, "compared_at": fraction, "kind": kind}


def keep(name: str, rows: Iterator[dict[str, Any]]) -> None:
    """Append the rows that the results file does not have yet."""
    place = ("data", "kind", "student", "compared_at", "method", "seed", "steps")
    known = {tuple(row[key] for key in place) for row in read_rows(LOG)}
    for row in rows:
        short = {"data": name, **{k: v for k, v in row.items() if k not in ("settings", "chosen", "key")}}
        if tuple(short[key] for key in place) not in known:
            known.add(tuple(short[key] for key in place))
            with LOG.open("a") as file:
                file.write(json.dumps(short) + "\n")


def tables(rows: list[dict[str, Any]], baseline: str) -> str:
    """Return one markdown table for each data set, kind of run and student, with differences from a method."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["kind"], row["student"]), []).append(row)
    return "\n\n".join(_table(*key, members, baseline) for key, members in groups.items())


def _table(data: str, kind: str, student: str, rows: list[dict[str, Any]], baseline: str) -> str:
    top1: dict[tuple[str, float], dict[int, float]] = {}
    for row in rows:
        top1.setdefault((row["method"], row["compared_at"]), {})[row["seed"]] = row["test_top1"]
    fractions = sorted({fraction for _, fraction in top1})
    names = dict.fromkeys(row["method"] for row in rows)
    order = [
        *(n for n in names if n not in (ALL_STEPS, ALL_EPOCHS)),
        *(n for n in (ALL_STEPS, ALL_EPOCHS) if n in names),
    ]
    head = " | ".join(f"{fraction:.0%}: top-1 | vs {baseline}" for fraction in fractions)
    lines = [f"{data}, {student}, {kind} runs", "", f"| method | {head} |", "|---|" + "---|---|" * len(fractions)]
    for method in order:
        cells = [_cells(top1.get((method, f), {}), top1.get((baseline, f), {}), method == baseline) for f in fractions]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(ours: dict[int, float], theirs: dict[int, float], same: bool) -> str:
    if not ours:
        return "*not run* | "
    values = list(ours.values())
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    text = f"{statistics.mean(values):.2f}{spread} (n = {len(values)})"
    common = sorted(ours.keys() & theirs.keys())
    if same or len(common) < 2:
        return f"{text} | "
    gaps = np.array([ours[seed] - theirs[seed] for seed in common])
    half = half_width(gaps)
    return f"{text} | {gaps.mean():+.2f} [{gaps.mean() - half:+.2f}, {gaps.mean() + half:+.2f}]"


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS, nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--teacher", help="checkpoint to import")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--long-seeds", type=int, default=2, help="seeds with all data for the same epochs")
    parser.add_argument("--full", action="store_true", help="240 epochs of a tenth, the methods of FULL")
    parser.add_argument("--baseline", default="random", help=f'of the differences: a method, or "{ALL_STEPS}"')
    parser.add_argument("--report", action="store_true", help="only print the tables")
    options = parser.parse_args()
    if not options.report:
        if not (options.preset and options.data and options.teacher and options.out):
            parser.error("pass a data set, --data, --teacher and --out, or --report")
        options.out.mkdir(parents=True, exist_ok=True)
        paths = Paths(options.data, options.out)
        prepare(PRESETS[options.preset], options.teacher, paths)
        rows = train_all(
            PRESETS[options.preset], paths, options.student, options.seeds, options.long_seeds, options.full
        )
        keep(options.preset, rows)
    print(tables(read_rows(LOG), options.baseline))


if __name__ == "__main__":
    main()
