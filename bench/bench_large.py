"""Scores and rules at the size of ImageNet: time and peak memory of `kdfast prune` by each of them.

`python bench/bench_large.py` writes results/large.json; `--samples` shrinks the data, `--depth` sets the width of the
features, and `--only` selects rows. The data are synthetic (see `large_data.py`), written below `--folder`, mapped into
memory, and deleted at the end. Each row is a process of its own that opens the inputs, scores and selects a tenth. Peak
memory is `anon`, what the process allocates, and `rss`, which also counts mapped pages of files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import harness
import large_data
import numpy as np
import torch

from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.select import SelectionMethod, SubsetPipeline, published_rule

FRACTION, EPOCHS, FEW_EPOCHS = 0.1, 30, 2
DYN, FEW = "dynamics", "two-runs"
# Name of a row: input, score or selector, its options, rule (None: that of the score), its options.
ROWS: dict[str, tuple[str, str, dict[str, Any], str | None, dict[str, Any]]] = {
    "random": ("cache", "random", {}, None, {}),
    "el2n": ("cache", "el2n", {}, None, {}),
    "grand": ("cache", "grand", {}, None, {}),
    "medium": ("cache", "medium", {}, None, {}),
    "moderate": ("cache", "moderate", {}, None, {}),
    "moderate, medians": ("cache", "moderate", {"fidelity": "code"}, None, {}),
    "d2": ("cache", "d2", {}, None, {}),
    "influence": ("cache", "influence", {}, None, {}),
    "influence, teacher's head": ("cache", "influence", {"polish": "no"}, None, {}),
    "influence, self": ("cache", "influence", {"kind": "self"}, None, {}),
    "influence, self, teacher's head": ("cache", "influence", {"kind": "self", "polish": "no"}, None, {}),
    "el2n by strata": ("cache", "el2n", {}, "strata", {}),
    "el2n by beta": ("cache", "el2n", {}, "beta", {"a": 2.0, "b": 2.0}),
    "el2n by bws": ("cache", "el2n", {}, "bws", {}),
    "if-beta": ("cache", "if-beta", {}, None, {}),
    "if-beta, paper": ("cache", "if-beta", {"preset": "paper", "score": "residual"}, None, {}),
    "el2n of dynamics": (DYN, "el2n", {}, None, {}),
    "forgetting": (DYN, "forgetting", {}, None, {}),
    "aum": (DYN, "aum", {}, None, {}),
    "aum of probabilities": (DYN, "aum", {"margin": "probability"}, None, {}),
    "ccs": (DYN, "ccs", {}, None, {}),
    "dual": (DYN, "dual", {}, None, {}),
    "dyn-unc": (DYN, "dyn-unc", {}, None, {}),
    "tdds": (DYN, "tdds", {}, None, {}),
    "memorization": (FEW, "memorization", {}, None, {}),
}


class PeakMemory:
    """The largest anonymous memory of this process while the block runs, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.anon, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.anon = max(self.anon, status("RssAnon"))
            if self._done.wait(0.02):
                return


def status(field: str) -> int:
    """Return a field of /proc/self/status, in bytes; 0 if there is none."""
    file = Path("/proc/self/status")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Select a tenth as `kdfast prune` does; return times and peak memory."""
    kind, method, options, rule, rule_options = ROWS[name]
    source = large_data.make_source(np.load(folder / "labels.npy"))
    inputs = {"cache": folder / "cache"} if kind == "cache" else {"dynamics": folder / kind}
    selector = method == "if-beta"
    started = time.perf_counter(), time.process_time()
    with PeakMemory() as peak:
        pipeline = SubsetPipeline(ScoreSources.open(source, **inputs))
        opened = time.perf_counter()
        asked = SelectionMethod(
            method,
            tuple(options.items()),
            None if selector else rule or published_rule(method),
            tuple(rule_options.items()),
        )
        asked.check()
        pipeline.check(asked, FRACTION)
        selection = pipeline.select(asked, FRACTION, 0)
    seconds = time.perf_counter() - opened
    score = float(selection.provenance.get("score_seconds", 0.0))
    if selector:
        score = float(selection.details["score_seconds"])
    return {
        "row": name,
        "samples": len(source.train),
        "open_s": round(opened - started[0], 1),
        "score_s": round(score, 1),
        "select_s": round(seconds - score, 1),
        "all_s": round(time.perf_counter() - started[0], 1),
        "cpu_s": round(time.process_time() - started[1], 1),
        "anon_gb": round(peak.anon / 1e9, 2),
        # Not that of getrusage, which begins at the memory of the parent.
        "rss_gb": round(status("VmHWM") / 1e9, 2),
        "digest": selection.provenance["scores"] and selection.provenance["scores"][:12],
    }


def make_data(folder: Path, samples: int, depth: int, kinds: set[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "labels.npy").exists():
        np.save(folder / "labels.npy", large_data.make_labels(samples))
    source = large_data.make_source(np.load(folder / "labels.npy"))
    if "cache" in kinds and not (folder / "cache").exists():
        large_data.make_cache(folder / "cache", source, depth)
    if DYN in kinds and not (folder / DYN).exists():
        large_data.make_dynamics(folder / DYN, source, EPOCHS)
    if FEW in kinds and not (folder / FEW).exists():
        large_data.make_dynamics(folder / FEW, source, FEW_EPOCHS, runs=2)


def run_row(name: str, folder: Path, limit: float) -> dict[str, Any]:
    """Measure a row in a process of its own; a row that fails says how."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"row": name, "failed": f"over {limit:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"row": name, "failed": lines[-1][:200] if lines else f"signal {-done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=large_data.FULL)
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where to write the data; default: a temporary folder")
    parser.add_argument("--only", action="append", choices=tuple(ROWS), help="rows to measure; default: all")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which a row is given up")
    parser.add_argument("--keep", action="store_true", help="keep the data")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--topic", default="large", help="name of the result file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.folder)))
        return
    names = arguments.only or list(ROWS)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kdfast-large-"))
    try:
        make_data(folder, arguments.samples, arguments.depth, {ROWS[name][0] for name in names})
        rows = []
        for name in names:
            rows.append(run_row(name, folder, arguments.limit))
            print(rows[-1], flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    print(harness.write_results(arguments.topic, rows, depth=arguments.depth, threads=arguments.threads))


if __name__ == "__main__":
    main()
