"""Shared by the benchmarks that pytest runs: the machine description, and the device."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(machine())


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where operators run")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")
