"""Install wheels, without network, into a folder that only the comparisons import from.

The wheels are those in $WHEELS, or in the folder `wheels` of the packed data.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu.part import SKIPPED
from gpu.results import PartResults, packed_folder


def main() -> None:
    """Install and record the wheels."""
    results = PartResults.from_environment()
    folder = Path(os.environ.get("WHEELS") or packed_folder() / "wheels")
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        print(f"no wheels in {folder}")
        sys.exit(SKIPPED)
    target = Path(os.environ["QUEUE_WORK"]) / "wheels"
    shutil.rmtree(target, ignore_errors=True)
    options = ("--no-index", "--no-deps", "--no-compile", "--target", str(target))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, wheels)], check=True)
    results.add(results.run, wheels=[wheel.name for wheel in wheels])


if __name__ == "__main__":
    main()
