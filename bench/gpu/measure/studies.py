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

from study_rows import identity, shorten

from gpu.data import TrainingData, whole_data
from gpu.part import SKIPPED
from gpu.results import ROOT, PartResults, Row, read_rows
from kdfast.nets.checkpoint import load_model

# The most telling cells first, few in a command: a new machine runs a command that was cut from its start. In the terms
# of `kdfast reproduce`; {teacher} is the packed one, those of figures 7 and 8 are trained.
_COMMANDS = {
    "cuda": {
        "fig6, a tenth, forgetting":
            "fig6 {teacher} --set fraction=0.1 --set method=forgetting --set alpha=1,0.5",
        "fig3, all data for the steps of 5%": "fig3 {teacher} --set match_steps_of=0.05",
        "fig12, a tenth": "fig12 {teacher} --set fraction=0.1",
        "fig3, all data for the steps of a tenth": "fig3 {teacher} --set match_steps_of=0.1",
        "fig6, 70%, 60 epochs":
            "fig6 {teacher} --epochs 60 --set fraction=0.7 --set method=forgetting --set alpha=1,0.5",
        "fig6, 5%, random": "fig6 {teacher} --set fraction=0.05 --set method=random --set alpha=1,0.5 --seeds 3",
        "fig8, half of the rest": "fig8 --set fraction=0.15",
        "fig7, a tenth, ResNet-14": "fig7 --set fraction=0.1 --set teacher=resnet14 --set kd=on",
        "fig7, a tenth, ResNet-56": "fig7 --set fraction=0.1 --set teacher=resnet56 --set kd=on",
    },
    "cpu": {"fig3, one epoch": "fig3 --epochs 1 --set fraction=1 --set kd=off"},
}  # fmt: skip
_OPTIONS = {"cuda": ("--precision", "bf16", "--jobs", "4"), "cpu": ()}


def reproduce(command: str, data: TrainingData, out: Path, device: str) -> None:
    """Run one of the commands."""
    teacher = f"{load_model(data.teacher).name}={data.teacher}"
    words = [part for word in command.split() for part in (("--teacher", teacher) if word == "{teacher}" else (word,))]
    options = ("--data", data.data, "--device", device, "--out", str(out), *_OPTIONS[device])
    subprocess.run([sys.executable, "-m", "kdfast", "reproduce", *words, *options], cwd=ROOT, check=True)


def finished(out: Path, results: PartResults) -> list[Row]:
    """Return the runs of a folder that no row has yet."""
    rows = [row for row in read_rows(results.path) if row["part"] == results.part]
    known = {identity(run) for row in rows for run in row.get("runs", ())}
    return [run for run in map(shorten, read_rows(out / "results.jsonl")) if identity(run) not in known]


def main() -> None:
    """Run the commands without a whole row."""
    results = PartResults.from_environment()
    data, out = whole_data(results.device), Path(os.environ["QUEUE_WORK"]) / "studies"
    if data is None:
        print("no packed data with all images: run gpu.pack_data with --rest")
        sys.exit(SKIPPED)
    failed = []
    for key, command in _COMMANDS[results.device].items():
        if key in results.measured():
            continue
        started, done = time.perf_counter(), False
        try:
            reproduce(command, data, out, results.device)
            done = True
        except subprocess.CalledProcessError:
            failed.append(key)
        finally:
            seconds = time.perf_counter() - started
            results.add(key, seconds=seconds, runs=finished(out, results), repeat=not done)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
