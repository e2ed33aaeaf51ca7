"""Add the machine description used by all benchmarks to pytest-benchmark's result files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(machine())
