"""The parts, in the order of their worth when the time may end at any of them."""

from __future__ import annotations

from gpu.part import Part

_PYTEST = ("-m", "pytest", "-p", "gpu.pytest_rows", "-p", "no:cacheprovider", "-q", "--tb=short", "--durations=5")
# Warnings do not fail the tests: the installed versions may differ from those that the tests were written for.
_LENIENT = ("-W", "default", "--continue-on-collection-errors")
# Some tests failed, or all had rows already.
_TESTED = (0, 1, 5)

_CUDA_TESTS = {
    "kd_loss": ("tests/ops/kd_loss",),
    "grad_norms": ("tests/ops/grad_norms",),
    "softmax_head": ("tests/ops/softmax_head",),
    "others": (
        "tests",
        "--ignore=tests/ops/kd_loss",
        "--ignore=tests/ops/grad_norms",
        "--ignore=tests/ops/softmax_head",
    ),
}
# The queue runs tests on a CPU only to test itself.
_CPU_TESTS = {
    "kd_loss": ("tests/ops/kd_loss/test_errors.py",),
    "grad_norms": ("tests/ops/grad_norms/test_errors.py",),
    "softmax_head": ("tests/ops/softmax_head/test_errors.py",),
    "others": ("tests/ops/test_backends.py",),
}


def parts(device: str) -> list[Part]:
    """Return the queue of a device, `cpu` or `cuda`."""
    return [
        Part("machine", 60, ("-m", "gpu.machine"), ("bench/harness.py",), always=True),
        Part("build", 240, ("-m", "gpu.build"), ("csrc", "CMakeLists.txt", "pyproject.toml"), always=True),
        *_tests(device),
        Part("kd_loss", 120, ("-m", "gpu.kd_loss"), ("kdfast/ops", "bench/gpu/kd_loss.py", "bench/harness.py")),
    ]


_SOURCES = Part("", 0, ()).sources


def _tests(device: str) -> list[Part]:
    paths = _CUDA_TESTS if device == "cuda" else _CPU_TESTS
    marker = ("-m", "cuda") if device == "cuda" else ("-m", "not slow")
    return [
        Part(f"tests {name}", 120, (*_PYTEST, *_LENIENT, *marker, *where), (*_SOURCES, "tests"), finished=_TESTED)
        for name, where in paths.items()
    ]
