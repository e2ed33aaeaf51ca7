"""Shared by the benchmarks: interleaved timing, machine description, and result files."""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("KDFAST_RESULTS") or Path(__file__).parent / "results")


@dataclass(frozen=True)
class Timing:
    """Times of one implementation: seconds per call, one entry per round; `graph`: as replays of a CUDA graph."""

    seconds: list[float]
    graph: bool = False

    @property
    def median(self) -> float:
        """Median in seconds per call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile in seconds per call."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        quartiles = statistics.quantiles(self.seconds, n=4)
        return quartiles[0], quartiles[2]

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """Return median, first and third quartile of other / self over the rounds: the speedup of self."""
        ratios = Timing([b / a for a, b in zip(self.seconds, other.seconds, strict=True)])
        return ratios.median, *ratios.spread


def interleave(
    contenders: dict[str, Callable[[], Any]],
    rounds: int = 21,
    *,
    target: float = 0.005,
    device: str = "cpu",
    repeated: bool = False,
) -> dict[str, Timing]:
    """Time functions in turn, so that load on the machine affects all of them equally.

    Args:
        contenders: Functions without arguments, by name; each is first called a few times to warm up.
        rounds: Number of timings of each function.
        target: Minimum duration of one timing in seconds; fast functions are called repeatedly to reach it.
        device: "cuda" synchronizes before and after each timing.
        repeated: Call a function once before each timing, so that it finds the memory that it has freed itself, as in a
            loop, and not what the function before it has freed.
    """
    counts = {}
    for name, function in contenders.items():
        for _ in range(3):
            function()
        counts[name] = max(1, round(target / max(_timed(function, 1, device), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in contenders.items():
                if repeated:
                    function()
                seconds[name].append(_timed(function, counts[name], device))
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class Usage:
    """What a command took: seconds; and its largest memory in bytes, with its children.

    `rss` counts all pages that are in memory, `anon` only those that are not pages of files or shared memory.
    """

    seconds: float
    rss: int
    anon: int


def run_kdfast(*arguments: object) -> None:
    """Print a kdfast command and run it."""
    subprocess.run(_announced(arguments), check=True)


def measure_kdfast(*arguments: object) -> Usage:
    """Print a kdfast command, run it and return what it took; end this program with a message if it fails."""
    import psutil  # a machine with a GPU may lack it

    command = _announced(arguments)
    started, rss, anon = time.perf_counter(), 0, 0
    process = psutil.Popen(command)
    while process.poll() is None:
        try:
            memory = [each.memory_info() for each in (process, *process.children(recursive=True))]
        except psutil.NoSuchProcess:
            continue
        rss = max(rss, sum(each.rss for each in memory))
        anon = max(anon, sum(each.rss - each.shared for each in memory))
        time.sleep(0.05)
    if process.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} exited with {process.returncode}")
    return Usage(time.perf_counter() - started, rss, anon)


def _announced(arguments: Iterable[object]) -> list[str]:
    words = [str(a) for a in arguments]
    print("$ kdfast " + shlex.join(words), flush=True)
    return [sys.executable, "-m", "kdfast", *words]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file with a JSON object in each line; none if it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cuda_peak(call: Callable[[], Any]) -> int:
    """Return the peak increase in allocated GPU memory during a call, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def machine() -> dict[str, Any]:
    """Describe what a result depends on: processor, threads, load, versions, commit."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit(folder: Path = Path(__file__).parent) -> str:
    """Return a checkout's commit, with "+" if files other than results have changed; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_results(topic: str, rows: list[dict[str, Any]], **extra: Any) -> Path:
    """Write <topic>.json with the machine description to bench/results or $KDFAST_RESULTS; return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{topic}.json"
    path.write_text(json.dumps({"machine": machine(), **extra, "rows": rows}, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as aligned text columns, with titles from the first row."""
    titles = list(rows[0])
    cells = [titles, *[[str(row.get(title, "")) for title in titles] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def copy_bandwidth(bytes_moved: int | None = None, device: str = "cpu", rounds: int = 9) -> float:
    """Return the bytes per second (read plus written) of copying one tensor to another, median over rounds.

    The default moves 256 MB on a CPU and 4 GB, many times the L2 cache, on a GPU. There it is the faster of a memory
    copy, which a CUDA graph runs at two thirds of the bandwidth of an H200, and a kernel.
    """
    size = bytes_moved or (2**32 if device == "cuda" else 2**28)
    a = torch.rand(size // 8, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    ways = [lambda: b.copy_(a), *([lambda: torch.neg(a, out=b)] if device == "cuda" else [])]
    return size / min(device_timing(way, device, rounds).median for way in ways)


def device_timing(call: Callable[[], Any], device: str, rounds: int = 9, *, calls: int = 1) -> Timing:
    """Time a function on its device, without what the host needs to start it.

    On a GPU, `calls` calls are captured in a CUDA graph, if possible, and its replays are timed by events.

    Args:
        call: The function; it must not wait for the device.
        device: "cpu" or "cuda".
        rounds: Number of timings.
        calls: Calls in each timing.
    """
    if device == "cpu":
        return interleave({"": call}, rounds)[""]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    replay = _capture(call, calls)
    again = replay or (lambda: [call() for _ in range(calls)])
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for _ in range(2):
        again()
    for mark in marks[:-1]:
        mark.record()
        again()
    marks[-1].record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 / calls for a, b in itertools.pairwise(marks)]
    return Timing(seconds, graph=replay is not None)


def _capture(call: Callable[[], Any], calls: int) -> Callable[[], Any] | None:
    """Return a function that replays the calls, or None if they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except RuntimeError as error:
        print(f"not captured, timed call by call: {error}", flush=True)
        torch.cuda.synchronize()
        return None
    return graph.replay


def _timed(function: Callable[[], Any], count: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count
