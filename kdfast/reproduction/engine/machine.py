"""The machine of a run, for its row: what speeds may be compared between."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

_CPU_INFO = Path("/proc/cpuinfo")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the name of the host, of the processor or the GPU, and the number of threads; JSON values."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"host": os.uname().nodename, "device": name, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else os.uname().machine
