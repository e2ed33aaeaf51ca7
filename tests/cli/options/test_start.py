"""Start-up is fast because heavy packages are imported only where they are used."""

import statistics
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("code", ["import kdfast", "import kdfast.cli", "import kdfast.cli.program"])
def test_no_heavy_import(code: str) -> None:
    script = f"import sys; {code}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )
    assert loaded.isdisjoint(
        {"torch", "numba", "ffcv", "triton", "scipy", "sklearn", "matplotlib", "numpy", "yaml", "msgspec"}
    )


def test_doctor_reports_that_the_extension_is_not_built() -> None:
    script = (
        "import sys; sys.modules['kdfast._native'] = None; sys.argv = ['kdfast', 'doctor']; "
        "from kdfast.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "native       the compiled extension is not built (" in done.stdout
    assert "run pip install . in the source folder of kdfast" in done.stdout
    assert "kd_loss, cpu -> reference: " in done.stdout


@pytest.mark.slow
def test_help_in_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kdfast", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) <= 0.5
