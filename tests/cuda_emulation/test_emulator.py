"""What the emulation of CUDA finds in kernels with faults: without this, the tests of the kernels could not fail."""

import re
import subprocess

import pytest


@pytest.fixture(scope="module")
def run(faults):
    """Return a function that runs a kernel of faults.cu; it returns the exit status and the output or message."""

    def run(kernel, seed=0):
        done = subprocess.run([faults, kernel, str(seed)], capture_output=True, text=True)
        return done.returncode, done.stderr if done.returncode else done.stdout

    return run


@pytest.mark.parametrize("seed", range(3))
def test_runs_correct_kernels(run, seed):
    assert run("reverse", seed) == (0, "".join(f"{i} " for i in reversed(range(64))))
    assert run("copy", seed) == (0, "".join(f"{i} " for i in range(1, 65)))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "skipped_barrier",
            r"deadlock: 10 of 64 threads wait, and 54 have returned; .* waits for its block at .*faults",
        ),
        ("two_barriers", r"divergent barrier: threads \d+ and \d+ wait at .*:\d+ and .*:\d+"),
        ("skipped_shuffle", r"deadlock: .* waits for its (warp|block)"),
        ("shared_overflow", "index 64 out of bounds"),
        ("global_overflow", "heap-buffer-overflow"),
        ("misaligned_copy", "not aligned"),
    ],
)
def test_reports_faults(run, kernel, message):
    status, output = run(kernel)
    assert status
    assert re.search(message, output)


def test_results_show_a_missing_barrier(run):
    outputs = {run("missing_barrier", seed)[1] for seed in range(4)}
    assert len(outputs) == 4
    assert all("nan" in output for output in outputs)


def test_results_show_a_copy_that_is_not_waited_for(run):
    assert "nan" in run("missing_wait")[1]


def test_names_what_it_does_not_understand(translate):
    with pytest.raises(AssertionError, match=r"extern __shared__ float values\[\];"):
        translate("extern __shared__ float values[];")
