"""The seconds of `kdfast plan` against those of the stages themselves, one after the other, round by round.

    python bench/check_plan.py digits --data digits --teacher teacher.pt --out runs/plan-digits
    python bench/check_plan.py cifar100 --data cifar-100-python --teacher T.pt --out runs/plan-cifar100 --rounds 5
    python bench/check_plan.py cifar100 ... --methods random,el2n,dual

A round runs the plan, then each of its stages by its command, into a new folder. What is compared are the seconds that
the stages record: of the cache `timing.json`, of the selection `idx.json`, of the training and the evaluation
`result.json`. Rows with the ratio plan / real are appended to bench/results/plan.jsonl; the table shows the median and
the range over the rounds.

Other work on the machine changes the speed between a plan and its stages. `--cpu-time` measures the seconds of the
process on a core instead, on both sides: on a busy machine it shows whether the plan is right, though not what a user
waits. It says nothing about the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, commit, machine

LOG = RESULTS / "plan.jsonl"
WALL = "from kdfast.cli import main; main()"
CPU = f"import time; time.perf_counter = time.monotonic = time.process_time; {WALL}"


class Preset:
    """The run of a data set: the recipe of its student, and how many epochs of dynamics it records."""

    def __init__(self, student: str, fraction: float, epochs: int, views: int, batch: int, recorded: int) -> None:
        self.student, self.fraction, self.recorded = student, fraction, recorded
        self.shared = ["--views", str(views)]
        self.recipe = ["--epochs", str(epochs), "--batch-size", str(batch)]


PRESETS = {
    "digits": Preset("resnet8", 0.5, 20, 9, 32, 4),
    "cifar100": Preset("resnet8", 0.1, 10, 5, 64, 2),
}


class Round:
    """A plan and its stages, in a folder of their own.

    Args:
        arguments: The arguments of this script.
        method: The method of the selection.
        number: Number of the round.
    """

    def __init__(self, arguments: argparse.Namespace, method: str, number: int) -> None:
        self.arguments, self.method = arguments, method
        self.preset = PRESETS[arguments.preset]
        self.folder = arguments.out / f"{method}-{number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def run(self) -> list[dict[str, Any]]:
        """Return a row for each part of a stage that records its seconds."""
        load = os.getloadavg()[0]
        plan = self.plan()
        stages = {stage["name"]: stage["parts"] for stage in plan["flows"]["pruned"]["stages"]}
        found = self.stages(stages)
        rows = []
        for (stage, part), seconds in found.items():
            planned = stages[stage][part] + (stages[stage].get("write", 0.0) if part == "teacher" else 0.0)
            facts = {"stage": stage, "part": part, "planned": planned, "real": seconds, "ratio": planned / seconds}
            rows.append({"preset": self.arguments.preset, "method": self.method, **facts, "load": load})
        planned, real = (sum(row[name] for row in rows) for name in ("planned", "real"))
        total = {"stage": "in all", "part": "", "planned": planned, "real": real, "ratio": planned / real}
        return [*rows, {"preset": self.arguments.preset, "method": self.method, **total, "load": load}]

    def plan(self) -> dict[str, Any]:
        """Return the plan."""
        preset, teacher = self.preset, str(self.arguments.teacher)
        return self.call(
            ["plan", "--teacher", teacher, "--student", preset.student, "--fraction", str(preset.fraction)],
            ["--method", self.method, *preset.shared, *preset.recipe, "--dynamics-epochs", str(preset.recorded)],
            ["--calibrate-seconds", str(self.arguments.seconds), "--json"],
        )

    def stages(self, planned: dict[str, Any]) -> dict[tuple[str, str], float]:
        """Run the stages; return the seconds that they record, by stage and part."""
        preset, teacher, found = self.preset, ["--teacher", str(self.arguments.teacher)], {}
        subset, cache, run = self.folder / "idx.npy", self.folder / "cache", self.folder / "run"
        kept = ["--fraction", str(preset.fraction), "--out", str(subset)]
        inputs: list[str] = []
        if "dynamics" in planned:
            path = self.folder / "dynamics"
            recorded = ["--epochs", str(preset.recorded), *preset.recipe[2:]]
            command = ["dynamics", "--net", preset.student, "--out", str(path), *recorded]
            # The passes that record are in no file, so the command is timed, without its start.
            start = self.timed(["prune", *kept, "--dry-run"])
            found["dynamics", "train and record"] = self.timed(command) - start
            inputs += ["--dynamics", str(path)]
        if "cache for scores" in planned:
            path = self.folder / "score-cache"
            self.call(["cache", *teacher, "--views", "1", "--out", str(path)])
            found["cache for scores", "teacher"] = read(path / "timing.json")["seconds"]
            inputs += ["--cache", str(path)]
        if "score" in planned:
            inputs += teacher
        self.call(["prune", "--method", self.method, *kept], inputs)
        if "score" not in planned:
            found["prune", "select"] = read(subset.with_suffix(".json"))["seconds"]
        self.call(["cache", *teacher, "--subset", str(subset), *preset.shared, "--out", str(cache)])
        found["cache", "teacher"] = read(cache / "timing.json")["seconds"]
        trained = ["--subset", str(subset), "--cache", str(cache), "--student", preset.student, "--out", str(run)]
        self.call(["distill", *trained], preset.shared, preset.recipe)
        costs = read(run / "result.json")["cost_seconds"]
        found["distill", "train"], found["distill", "evaluate"] = costs["train"], costs["evaluate"]
        return found

    def timed(self, words: list[str]) -> float:
        """Run a command; return its seconds."""
        started = self.clock()
        self.call(words)
        return self.clock() - started

    def clock(self) -> float:
        """Return the time, or the seconds on a core of all commands so far."""
        if not self.arguments.cpu_time:
            return time.perf_counter()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def call(self, *parts: list[str]) -> Any:
        """Run a command on the data; return what it prints as JSON, if it does."""
        words = [word for part in parts for word in part]
        script = CPU if self.arguments.cpu_time else WALL
        command = [sys.executable, "-c", script, *words, "--data", self.arguments.data, "--device", "cpu"]
        done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(words)}: {done.stderr}")
        return json.loads(done.stdout) if "--json" in words else None


def read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    return json.loads(path.read_text())


def report(rows: list[dict[str, Any]]) -> str:
    """Return a table of the ratios plan / real."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["clock"], row["preset"], row["method"], row["stage"], row["part"])
        groups.setdefault(key, []).append(row)
    lines = [
        "| clock | data | method | stage | part | real, s | plan / real | range | rounds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, found in groups.items():
        ratios = [row["ratio"] for row in found]
        real = statistics.median(row["real"] for row in found)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {' | '.join(key)} | {real:.2f} | {statistics.median(ratios):.2f} | {spread} | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rounds that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the stages' outputs")
    parser.add_argument("--methods", default="random,el2n")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of the plan's measurements")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--log", type=Path, default=LOG)
    arguments = parser.parse_args()
    facts = {"clock": "cpu" if arguments.cpu_time else "wall", "machine": machine(), "commit": commit()}
    for number in range(arguments.rounds):
        for method in arguments.methods.split(","):
            rows = [{**row, "round": number, **facts} for row in Round(arguments, method, number).run()]
            with arguments.log.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(report(rows), flush=True)
    print(report([json.loads(line) for line in arguments.log.read_text().splitlines()]))


if __name__ == "__main__":
    main()
