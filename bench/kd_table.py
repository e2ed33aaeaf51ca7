"""Compare distillation with plain training on a tenth of the data: one resumable command, one table and one plot.

    python bench/kd_table.py digits --out demo
    python bench/kd_table.py cifar10 --data cifar-10-batches-py --teacher resnet56.th --out runs/cifar10
    python bench/kd_table.py cifar100 --data cifar-100-python --teacher resnet32.pt --out runs/cifar100

Each step is a `kdfast` command, printed before it runs. Students of a row differ in the seed (initial weights, order,
views and the random, class-balanced subset). The two rows of a table differ only in --alpha: same subsets, same steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from harness import run_kdfast, write_results

from kdfast.report import plot_runs


@dataclass(frozen=True)
class Preset:
    """Settings of one table: networks, kept fraction, seeds, and the flags of each command."""

    teacher_net: str
    student: str
    fraction: float
    views: int
    seeds: tuple[int, ...]
    student_flags: str
    teacher_flags: str
    cache_flags: str = ""


PRESETS = {
    "digits": Preset(
        teacher_net="resnet20",
        student="resnet8",
        fraction=0.1,
        views=9,
        seeds=(0, 1, 2),
        student_flags="--epochs 60 --batch-size 32 --lr 0.1 --schedule cosine --eval-every 5",
        teacher_flags="--epochs 12 --batch-size 64 --lr 0.1 --schedule cosine",
    ),
    "cifar10": Preset(
        teacher_net="resnet56a",
        student="resnet8",
        fraction=0.1,
        views=20,
        seeds=(0, 1, 2),
        student_flags="--epochs 80 --batch-size 64 --lr 0.1 --schedule cosine --precision bf16",
        teacher_flags="--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
        cache_flags="--precision bf16",
    ),
    "cifar100": Preset(
        teacher_net="resnet32",
        student="resnet20",
        fraction=0.1,
        views=20,
        seeds=(0,),
        student_flags="--epochs 80 --batch-size 64 --lr 0.1 --schedule cosine --precision bf16",
        teacher_flags="--mean 0.5071,0.4867,0.4408 --std 0.2675,0.2565,0.2761",
        cache_flags="--precision bf16",
    ),
}


def make_teacher(preset: Preset, data: str, checkpoint: str | None, out: Path) -> Path:
    """Import the checkpoint, or train a teacher without one."""
    teacher = out / "teacher.pt"
    if teacher.exists():
        return teacher
    net = ("--net", preset.teacher_net, "--out", teacher)
    if checkpoint is None:
        run_kdfast("teacher", "train", "--data", data, *net, *preset.teacher_flags.split())
    else:
        run_kdfast("teacher", "import", checkpoint, "--data", data, *net, *preset.teacher_flags.split())
    return teacher


def run_seed(preset: Preset, data: str, teacher: Path, out: Path, seed: int) -> dict[str, Path]:
    """Prune, cache the teacher on the subset, and train both students of one seed."""
    subset, cache = out / f"idx-{seed}.npy", out / f"cache-{seed}"
    if not subset.exists():
        flags = ("--method", "random", "--fraction", str(preset.fraction), "--seed", str(seed))
        run_kdfast("prune", "--data", data, *flags, "--out", subset)
    flags = ("--subset", subset, "--views", str(preset.views), *preset.cache_flags.split())
    run_kdfast("cache", "--data", data, "--teacher", teacher, *flags, "--out", cache)
    common = ("--data", data, "--subset", subset, "--student", preset.student, "--seed", str(seed))
    flags = preset.student_flags.split()
    runs = {"KD": out / f"kd-{seed}", "no KD": out / f"plain-{seed}"}
    run_kdfast("distill", *common, "--cache", cache, "--alpha", "auto", *flags, "--out", runs["KD"])
    run_kdfast("distill", *common, "--alpha", "0", *flags, "--out", runs["no KD"])
    return runs


def table(name: str, preset: Preset, results: dict[str, list[dict[str, float]]]) -> str:
    """Return the markdown table: mean and standard deviation over the seeds."""
    lines = [
        f"| {name}, {preset.student}, {preset.fraction:.0%} kept | alpha | views | steps | test top-1 (n = "
        f"{len(preset.seeds)}) | each seed |",
        "|---|---|---|---|---|---|",
    ]
    for row, runs in results.items():
        scores = [run["test_top1"] for run in runs]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        each = ", ".join(f"{score:.2f}" for score in scores)
        first = runs[0]
        lines.append(
            f"| {row} | {first['alpha']:g} | {first['views']} | {first['steps']} | "
            f"{statistics.mean(scores):.2f}{spread} | {each} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every seed, print the table, and write table.md and curves.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--teacher", help="checkpoint to import; default: train a teacher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--record", action="store_true", help="also write bench/results/kd_PRESET.json")
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    teacher = make_teacher(preset, options.data, options.teacher, out)
    folders = [run_seed(preset, options.data, teacher, out, seed) for seed in preset.seeds]
    results = {row: [json.loads((f[row] / "result.json").read_text()) for f in folders] for row in folders[0]}
    text = table(options.preset, preset, results)
    (out / "table.md").write_text(text + "\n")
    if options.record:
        rows = [{"row": row, "seed": seed, **run} for row, runs in results.items()
                for seed, run in zip(preset.seeds, runs, strict=True)]  # fmt: skip
        write_results(f"kd_{options.preset}", rows)
    plot_runs({row: [f[row] for f in folders] for row in folders[0]}, out / "curves.png")
    print(f"\n{text}\n\n{time.perf_counter() - started:.0f} s in total; table.md, curves.png and all runs are in {out}")


if __name__ == "__main__":
    main()
