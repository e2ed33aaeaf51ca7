"""Child processes that a test can kill, and file systems that are full or read-only."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def launch(code: str, *args: object, mount: str = "") -> subprocess.Popen:
    """Start a Python process on `code`; with `mount`, in its own mount namespace after this shell command."""
    command = [sys.executable, "-c", code, *map(str, args)]
    if mount:
        command = [*NAMESPACE, "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def start_python():
    """Start a Python process: (code, *arguments) -> Popen with text pipes."""
    return launch


@pytest.fixture
def run_mounted(tmp_path):
    """Run code in a temporary file system: (mount options, code) -> standard output; the folder is `sys.argv[1]`."""
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not available")

    def run(options: str, code: str) -> str:
        folder = tmp_path / "mounted"
        folder.mkdir()
        child = launch(code, folder, mount=f"mount -t tmpfs -o {options} tmpfs {folder}")
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        return out

    return run
