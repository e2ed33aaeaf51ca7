"""The parts, in the order of their worth when the time may end at any of them."""

from __future__ import annotations

from gpu.part import Part

_PYTEST = ("-m", "pytest", "-p", "gpu.pytest_rows", "-p", "no:cacheprovider", "-q", "--tb=short", "--durations=5")
# Warnings do not fail the tests: the installed versions may differ from those that the tests were written for.
_LENIENT = ("-W", "default", "--continue-on-collection-errors")
# Some tests failed, or all had rows already.
_TESTED = (0, 1, 5)

_OPERATORS = ("kdfast/ops", "csrc")
_TRAINING = (*_OPERATORS, "kdfast/data", "kdfast/nets", "kdfast/teacher", "kdfast/distill", "bench/gpu/data.py")
_CASES = (*_OPERATORS, "bench/gpu/small_cases.py", "bench/gpu/kd_loss.py", "bench/gpu/tools.py")

# Folders of tests. On a CPU, where the queue only tests itself, a few quick ones replace those marked cuda.
_TESTS = {
    "kd_loss": ("tests/ops/kd_loss", "tests/ops/kd_loss/test_errors.py"),
    "grad_norms": ("tests/ops/grad_norms", "tests/ops/grad_norms/test_errors.py"),
    "softmax_head": ("tests/ops/softmax_head", "tests/ops/softmax_head/test_errors.py"),
    "others": ("tests", "tests/ops/test_backends.py"),
}


def parts(device: str) -> list[Part]:
    """Return the queue of a device, `cpu` or `cuda`."""
    return [
        Part("machine", 60, ("-m", "gpu.machine"), ("bench/harness.py",), always=True),
        Part("build", 240, ("-m", "gpu.build"), ("csrc", "CMakeLists.txt", "pyproject.toml"), always=True),
        *_tests(device),
        Part("kd_loss", 100, ("-m", "gpu.kd_loss"), ("kdfast/ops", "bench/gpu/kd_loss.py", "bench/harness.py")),
        Part("training", 240, ("-m", "gpu.training"), (*_TRAINING, "bench/gpu/training.py", "bench/gpu/resnet18.py")),
        _students("students", 0),
        Part("sanitizer", 180, ("-m", "gpu.tools", "sanitizer"), _CASES),
        Part("counters", 90, ("-m", "gpu.tools", "counters"), _CASES),
        Part(
            "gradients",
            150,
            ("-m", "gpu.gradients"),
            (*_OPERATORS, "bench/gpu/gradients.py", "bench/bench_grad_norms.py", "bench/bench_influence.py"),
        ),
        Part(
            "selection",
            150,
            ("-m", "gpu.selection"),
            (*_TRAINING, "kdfast/prune/if_beta", "bench/gpu/selection.py", "bench/bench_if_beta.py"),
        ),
        Part("wheels", 60, ("-m", "gpu.wheels"), ("bench/gpu/wheels.py",), always=True),
        Part(
            "peers",
            240,
            ("-m", "gpu.peers"),
            (*_TRAINING, "bench/gpu/peers.py", "bench/plain_loop.py", "bench/bench_kd_loss.py"),
            wheels=True,
        ),
        *([_students("more students", 1, 2)] if device == "cuda" else []),
    ]


def _students(name: str, *seeds: int) -> Part:
    command = ("-m", "gpu.students", *map(str, seeds))
    return Part(name, 200 * len(seeds), command, (*_TRAINING, "bench/gpu/students.py"))


def _tests(device: str) -> list[Part]:
    found = []
    for name, (folder, few) in _TESTS.items():
        where = (folder, "-m", "cuda") if device == "cuda" else (few, "-m", "not slow")
        apart = [f"--ignore={other}" for other, _ in _TESTS.values() if name == "others" and other != "tests"]
        sources = ("kdfast", "csrc", "tests") if name == "others" else (*_OPERATORS, "tests/conftest.py", folder)
        found.append(Part(f"tests {name}", 110, (*_PYTEST, *_LENIENT, *where, *apart), sources, finished=_TESTED))
    return found
