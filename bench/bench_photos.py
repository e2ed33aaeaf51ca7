"""Images of mixed sizes, from a folder of JPEG files to a student: speed and memory of every stage and loader.

    python bench/make_photo_folder.py --cifar10 cifar-10-batches-py --cifar100 cifar-100-python --out photos
    python bench/bench_photos.py --photos photos --out runs/photos [--side 128] [--rounds 3]

Every stage is a command of kdfast in its own process: convert to FFCV, train a teacher, cache 8 views of the ten most
probable classes, prune to 30% and distill. The same distillation runs with each loader in turn and must write the same
student to the bit. Memory is that of the process and its children when it is largest: `anon` is what they allocate,
`rss` also counts mapped pages of files. --out must be new: a stage that is done already would take no time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from harness import Usage, measure_kdfast, table, write_results

NETWORK = f"{Path(__file__).with_name('photo_network.py')}:ResNet18"
LOADERS = ("resident", "ffcv", "files")


def stage_row(name: str, usage: Usage, **figures: Any) -> dict[str, Any]:
    """Return the row of a stage."""
    rss, anon = usage.rss / 1e9, usage.anon / 1e9
    return {
        "stage": name,
        "seconds": round(usage.seconds, 1),
        "anon_gb": round(anon, 2),
        "rss_gb": round(rss, 2),
        **figures,
    }


def prepare(photos: Path, out: Path, side: int) -> list[dict[str, Any]]:
    """Run every stage before the student; return their rows."""
    data, teacher = ["--data", photos, "--size", side], out / "teacher.pt"
    convert = measure_kdfast("data", "convert", photos, out / "ffcv", "--size", side)
    train = measure_kdfast(
        "teacher", "train", *data, "--net", NETWORK, "--net-arg", "width=32", "--epochs", 2, "--lr", 0.05,
        "--schedule", "cosine", "--precision", "auto", "--out", teacher,
    )  # fmt: skip
    cache = measure_kdfast(
        "cache", *data, "--teacher", teacher, "--teacher-net", NETWORK, "--views", 8, "--top-k", 10,
        "--precision", "auto", "--out", out / "cache",
    )  # fmt: skip
    prune = measure_kdfast("prune", *data, "--method", "random", "--fraction", 0.3, "--out", out / "random.npy")
    size = sum(file.stat().st_size for file in (out / "cache").iterdir())
    top1 = json.loads((out / "teacher.pt.run" / "result.json").read_text())["test_top1"]
    return [
        stage_row("convert", convert),
        stage_row("teacher train", train, top1=top1),
        stage_row("cache", cache, cache_mb=round(size / 1e6, 1)),
        stage_row("prune", prune),
    ]


def distill(photos: Path, out: Path, side: int, loader: str) -> tuple[Usage, dict[str, Any], str]:
    """Train the student with a loader; return what it took, its result, and the digest of its file."""
    data = ["--data", out / "ffcv"] if loader == "ffcv" else ["--data", photos, "--size", side]
    run = out / f"run-{loader}"
    usage = measure_kdfast(
        "distill", *data, "--cache", out / "cache", "--subset", out / "random.npy", "--student", NETWORK,
        "--net-arg", "width=16", "--epochs", 2, "--precision", "auto", "--loader", loader, "--out", run, "--force",
    )  # fmt: skip
    digest = hashlib.sha256((run / "student.pt").read_bytes()).hexdigest()
    return usage, json.loads((run / "result.json").read_text()), digest


def main() -> None:
    """Run all, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of make_photo_folder.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    photos, out, side = arguments.photos, arguments.out, arguments.side
    out.mkdir(parents=True)
    rows = prepare(photos, out, side)
    found: dict[str, list[tuple[Usage, dict[str, Any], str]]] = {loader: [] for loader in LOADERS}
    for _ in range(arguments.rounds):
        for loader, runs in found.items():
            runs.append(distill(photos, out, side, loader))
    digests = {digest for runs in found.values() for *_, digest in runs}
    if len(digests) > 1:
        raise SystemExit(f"the students of {', '.join(LOADERS)} differ")
    for loader, runs in found.items():
        rates = sorted(result["images"] / result["seconds"] for _, result, _ in runs)
        largest = max((usage for usage, *_ in runs), key=lambda usage: usage.rss)
        figures = {"images/s": round(statistics.median(rates)), "range": f"{rates[0]:.0f} to {rates[-1]:.0f}"}
        rows.append(stage_row(f"distill, {loader}", largest, **figures, digest=runs[0][2][:12]))
    print(table([{**dict.fromkeys(("images/s", "range", "top1", "cache_mb"), ""), **row} for row in rows]))
    write_results("photos", rows, side=side, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
