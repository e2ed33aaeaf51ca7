"""The parts, in the order of their worth when the time may end at any of them."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from gpu.part import Part
from gpu.results import ROOT

_PYTEST = ("-m", "pytest", "-p", "gpu.pytest_rows", "-p", "no:cacheprovider", "-q", "--tb=short", "--durations=5")
# Warnings do not fail the tests: the installed versions may differ from those that the tests were written for.
_LENIENT = ("-W", "default", "--continue-on-collection-errors")
# Some tests failed, or all had rows already.
_TESTED = (0, 1, 5)

_OPERATORS = ("kdfast/ops", "csrc")
_TRAINING = (*_OPERATORS, "kdfast/data", "kdfast/nets", "kdfast/teacher", "kdfast/distillation", "bench/gpu/data.py")
_STUDIES = (*_TRAINING, "kdfast/dynamics", "kdfast/pruning", "kdfast/reproduction", "kdfast/studies", "kdfast/sweep")
_SMALL = ("bench/gpu/measure/small_cases.py", "bench/gpu/measure/kd_loss.py")

# On a CPU, where the queue only tests itself, a few quick tests replace those marked cuda.
_FEW_TESTS = tuple(f"tests/ops/{name}/test_errors.py" for name in ("kd_loss", "grad_norms", "softmax_head"))
_TEST_PROCESSES = 10  # Triton compiles most of the time


def parts(device: str) -> list[Part]:
    """Return the queue of a device, `cpu` or `cuda`."""
    heads = ("bench/bench_grad_norms.py", "bench/bench_grad_metric.py", "bench/bench_influence.py")
    peers = ("bench/plain_loop.py", "bench/bench_kd_loss.py")
    queue = [
        _program("machine", 60, "bench/harness.py", always=True),
        _program("build", 240, "csrc", "CMakeLists.txt", "pyproject.toml", always=True),
        _program("kd_loss", 100, "kdfast/ops", "bench/harness.py"),
        _program("training", 300, *_TRAINING),
        _students("students", 0),
        _tests("tests kd_loss", device, "tests/ops/kd_loss"),
        _program("tools", 180, *_OPERATORS, *_SMALL, name="sanitizer", arguments=("sanitizer",)),
        _program("tools", 90, *_OPERATORS, *_SMALL, name="counters", arguments=("counters",)),
        _program("side_by_side", 150, *_TRAINING, "kdfast/sweep"),
        _tests("tests others", device, "tests", apart="tests/ops/kd_loss"),
        _program("gradients", 210, *_OPERATORS, *heads),
        _program("selection", 150, *_TRAINING, "kdfast/pruning/if_beta", "bench/bench_if_beta.py"),
        _program("wheels", 60, always=True),
        _program("peers", 240, *_TRAINING, *heads, *peers, wheels=True),
        _program("studies", 480, *_STUDIES, "bench/study_rows.py"),
    ]
    if device == "cpu":  # of a machine that runs other tests at the same time
        return [replace(part, seconds=3 * part.seconds) for part in queue]
    return [*queue, _students("more students", 1, 2)]


def _program(
    program: str,
    seconds: float,
    *sources: str,
    name: str | None = None,
    arguments: tuple[str, ...] = (),
    always: bool = False,
    wheels: bool = False,
) -> Part:
    """Return the part that runs a module of gpu.measure, with its limit and the sources besides the module."""
    command = ("-m", f"gpu.measure.{program}", *arguments)
    return Part(
        name or program, seconds, command, (*sources, f"bench/gpu/measure/{program}.py"), always=always, wheels=wheels
    )


def _students(name: str, *seeds: int) -> Part:
    return _program("students", 200 * len(seeds), *_TRAINING, name=name, arguments=tuple(map(str, seeds)))


def _tests(name: str, device: str, folder: str, apart: str | None = None) -> Part:
    """Return the tests of a folder, without those of another, in several processes if pytest-xdist is installed."""
    several = device == "cuda" and find_spec("xdist") is not None
    processes = ("-n", str(_TEST_PROCESSES), "--dist", "worksteal") if several else ()
    files = [file for file in _test_files(device, folder) if not (apart and file.startswith(apart))]
    marked = "cuda" if device == "cuda" else "not slow"
    command = (*_PYTEST, *_LENIENT, "-m", marked, *processes, *files)
    sources = ("kdfast", "csrc", "tests") if apart else (*_OPERATORS, "tests/conftest.py", folder)
    return Part(name, 200, command, sources, finished=_TESTED)


def _test_files(device: str, folder: str) -> list[str]:
    """Return the files with tests that need a GPU; to collect all others takes longer than many of these tests."""
    if device == "cpu":
        return [file for file in _FEW_TESTS if file.startswith(folder)]
    files = sorted((ROOT / folder).rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.cuda" in file.read_text()]
