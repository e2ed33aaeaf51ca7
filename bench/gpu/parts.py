"""The parts, in the order of their worth when the time may end at any of them."""

from __future__ import annotations

from dataclasses import replace

from gpu.part import Part

_PYTEST = ("-m", "pytest", "-p", "gpu.pytest_rows", "-p", "no:cacheprovider", "-q", "--tb=short", "--durations=5")
# Warnings do not fail the tests: the installed versions may differ from those that the tests were written for.
_LENIENT = ("-W", "default", "--continue-on-collection-errors")
# Some tests failed, or all had rows already.
_TESTED = (0, 1, 5)

_OPERATORS = ("kdfast/ops", "csrc")
_TRAINING = (*_OPERATORS, "kdfast/data", "kdfast/nets", "kdfast/teacher", "kdfast/distillation", "bench/gpu/data.py")
_STUDIES = (*_TRAINING, "kdfast/dynamics", "kdfast/pruning", "kdfast/reproduction", "kdfast/studies", "kdfast/sweep")
_SMALL = ("bench/gpu/measure/small_cases.py", "bench/gpu/measure/kd_loss.py")

# Folders of tests. On a CPU, where the queue only tests itself, a few quick ones replace those marked cuda.
_TESTS = {
    "kd_loss": ("tests/ops/kd_loss", "tests/ops/kd_loss/test_errors.py"),
    "grad_norms": ("tests/ops/grad_norms", "tests/ops/grad_norms/test_errors.py"),
    "softmax_head": ("tests/ops/softmax_head", "tests/ops/softmax_head/test_errors.py"),
    "others": ("tests", "tests/ops/test_backends.py"),
}


def parts(device: str) -> list[Part]:
    """Return the queue of a device, `cpu` or `cuda`."""
    heads = ("bench/bench_grad_norms.py", "bench/bench_grad_metric.py", "bench/bench_influence.py")
    peers = ("bench/plain_loop.py", "bench/bench_kd_loss.py")
    # The tests of other operators say nothing about the loss and the training, which are the first to know.
    loss_tests, *other_tests = _tests(device)
    queue = [
        _program("machine", 60, "bench/harness.py", always=True),
        _program("build", 240, "csrc", "CMakeLists.txt", "pyproject.toml", always=True),
        loss_tests,
        _program("kd_loss", 100, "kdfast/ops", "bench/harness.py"),
        _program("training", 240, *_TRAINING),
        _students("students", 0),
        _program("side_by_side", 150, *_TRAINING, "kdfast/sweep"),
        *other_tests,
        _program("tools", 180, *_OPERATORS, *_SMALL, name="sanitizer", arguments=("sanitizer",)),
        _program("tools", 90, *_OPERATORS, *_SMALL, name="counters", arguments=("counters",)),
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


def _tests(device: str) -> list[Part]:
    found = []
    for name, (folder, few) in _TESTS.items():
        where = (folder, "-m", "cuda") if device == "cuda" else (few, "-m", "not slow")
        apart = [f"--ignore={other}" for other, _ in _TESTS.values() if name == "others" and other != "tests"]
        sources = ("kdfast", "csrc", "tests") if name == "others" else (*_OPERATORS, "tests/conftest.py", folder)
        seconds = 170 if name == "kd_loss" else 100  # Triton compiles for minutes
        found.append(Part(f"tests {name}", seconds, (*_PYTEST, *_LENIENT, *where, *apart), sources, finished=_TESTED))
    return found
