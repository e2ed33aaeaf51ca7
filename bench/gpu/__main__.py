"""Run the parts in order until the time is over; see bench/gpu.sh."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from gpu.parts import parts
from gpu.results import ROOT
from gpu.run_queue import Queue


def main(arguments: list[str]) -> int:
    """Run the queue and return the exit code."""
    device = os.environ.get("DEVICE", "cuda")
    if device not in ("cpu", "cuda"):
        sys.exit(f"DEVICE is {device!r}: set it to cpu or cuda")
    queue_parts = parts(device)
    minutes, *wanted = arguments or ["9"]
    if not minutes.replace(".", "", 1).isdigit():
        sys.exit("usage: OUT=FOLDER bash bench/gpu.sh [MINUTES [PART]...]")
    if unknown := set(wanted) - {part.name for part in queue_parts}:
        sys.exit(
            f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in queue_parts)}"
        )
    # Those that prepare the machine come before any.
    queue_parts = [part for part in queue_parts if part.name in wanted or part.always or not wanted]
    work = Path(os.environ.get("WORK") or ROOT / "build" / f"gpu-{device}").resolve()
    # A caller's time limit ends the part at hand like a limit of its own, with its traceback in the log.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    queue = Queue(Path(os.environ["OUT"]), work, device, minutes=float(minutes))
    return queue.run(queue_parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
