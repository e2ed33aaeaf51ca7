"""Figures of the papers at their own recipe: `kdfast reproduce`, several students at a time.

A row holds the results of one command, as bench/study_rows.py copies them from here. A command that the time limit ends
leaves a row of the runs that it finished.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from study_rows import shorten

from gpu.data import TrainingData, whole_data
from gpu.part import SKIPPED
from gpu.results import ROOT, PartResults, Row, read_rows
from kdfast.nets.checkpoint import load_model

# The most telling cells first; each command in the terms of `kdfast reproduce`. {teacher} is the packed one; those of
# figures 7 and 8 are trained.
_COMMANDS = {
    "cuda": {
        "fig6 at a tenth, forgetting": "fig6 {teacher} --set fraction=0.1 --set method=forgetting --set alpha=1,0.5",
        "fig3, all data": "fig3 {teacher} --set match_steps_of=0.05,0.1",
        "fig12 at a tenth": "fig12 {teacher} --set fraction=0.1",
        "fig7 at a tenth": "fig7 --set fraction=0.1 --set teacher=resnet14,resnet56",
        "fig8 at half of the rest": "fig8 --set fraction=0.15",
        "fig6 at 70%, 60 epochs":
            "fig6 {teacher} --epochs 60 --set fraction=0.7 --set method=forgetting --set alpha=1,0.5",
        "fig6 at 5%, random": "fig6 {teacher} --set fraction=0.05 --set method=random --set alpha=1,0.5 --seeds 3",
    },
    "cpu": {"fig3, one epoch": "fig3 --epochs 1 --set fraction=1 --set kd=off"},
}  # fmt: skip
_OPTIONS = {"cuda": ("--precision", "bf16", "--jobs", "4"), "cpu": ()}


def reproduce(command: str, data: TrainingData, out: Path, device: str) -> None:
    """Run one of the commands."""
    teacher = f"--teacher {load_model(data.teacher).name}={data.teacher}"
    words = [*command.format(teacher=teacher).split(), "--data", data.data, "--device", device, "--out", str(out)]
    subprocess.run([sys.executable, "-m", "kdfast", "reproduce", *words, *_OPTIONS[device]], cwd=ROOT, check=True)


def finished(out: Path) -> list[Row]:
    """Return the finished runs of a folder."""
    return [shorten(row) for row in read_rows(out / "results.jsonl")]


def main() -> None:
    """Run the commands without a whole row."""
    results = PartResults.from_environment()
    data, out = whole_data(results.device), Path(os.environ["QUEUE_WORK"]) / "studies"
    if data is None:
        print("no packed data with all images: run gpu.pack_data with --rest")
        sys.exit(SKIPPED)
    for key, command in _COMMANDS[results.device].items():
        if key in results.measured():
            continue
        before, started, done = finished(out), time.perf_counter(), False
        try:
            reproduce(command, data, out, results.device)
            done = True
        finally:
            runs = [row for row in finished(out) if row not in before]
            results.add(key, seconds=time.perf_counter() - started, runs=runs, repeat=not done)


if __name__ == "__main__":
    main()
