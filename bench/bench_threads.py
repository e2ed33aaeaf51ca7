"""Training speed on a quiet and on a busy CPU: threads that spin while they wait, threads that sleep, and one thread.

    python bench/bench_threads.py [--student resnet32] [--busy 1] [--rounds 3]

Each setting trains in a process of its own, in turn; `--busy` processes run beside half of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

from harness import table, write_results

SETTINGS = {
    "threads spin": {"OMP_WAIT_POLICY": "ACTIVE"},
    "OpenMP's default": {},
    "threads sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "threads spin briefly (kdfast's default)": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}

TRAIN = """
import sys, time
import torch
from torch.nn.functional import cross_entropy
from kdfast.nets import build_net
net = build_net(sys.argv[1], 100).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
x = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
y = torch.randint(0, 100, (64,))
done, start = -1, time.perf_counter()
while done < 3 or time.perf_counter() - start < float(sys.argv[2]):
    if done == 0:
        start = time.perf_counter()
    optimizer.zero_grad()
    cross_entropy(net(x), y).backward()
    optimizer.step()
    done += 1
print(64 * done / (time.perf_counter() - start))
"""


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` cores busy during the block."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def images_per_second(student: str, seconds: float, setting: dict[str, str]) -> float:
    """Train for some seconds in a process with these environment variables."""
    unset = {"OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | setting
    command = [sys.executable, "-c", TRAIN, student, str(seconds)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print one table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet32")
    parser.add_argument("--busy", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {(name, busy): [] for name in SETTINGS for busy in (0, options.busy)}
    for _ in range(options.rounds):
        for (name, busy), speeds in found.items():
            with busy_processes(busy):
                speeds.append(images_per_second(options.student, options.seconds, SETTINGS[name]))
    rows = [
        {
            "setting": name,
            "busy processes": busy,
            "images/s": round(statistics.median(speeds)),
            "range": f"{min(speeds):.0f} to {max(speeds):.0f}",
        }
        for (name, busy), speeds in found.items()
    ]
    print(table(rows))
    write_results("threads", rows, student=options.student, batch_size=64, rounds=options.rounds)


if __name__ == "__main__":
    main()
