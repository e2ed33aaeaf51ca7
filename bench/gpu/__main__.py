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
    if len(arguments) > 1:
        sys.exit("usage: OUT=FOLDER bash bench/gpu.sh [MINUTES]")
    work = Path(os.environ.get("WORK") or ROOT / "build" / f"gpu-{device}").resolve()
    # A caller's time limit ends the part at hand like a limit of its own, with its traceback in the log.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    queue = Queue(Path(os.environ["OUT"]), work, device, minutes=float(arguments[0]) if arguments else 9)
    return queue.run(parts(device))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
