"""Second part: build and install kdfast for the GPU at hand, without network.

    python -m gpu.measure.build 90     # beforehand, with the Python of the other machine, for compute capability 9.0

An extension of the same sources, Python and GPU in the packed data's folder `built` is taken as it is. Otherwise an
editable installation is tried first, then CMake alone, with the extension put into the source tree. On a CPU the part
only configures the build, to leave the installed extension alone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

from gpu.results import ROOT, PartResults, hash_sources, packed_folder

EXTENSION = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
_CHECK = "import kdfast._native as n; print(n.__file__, n.cuda)"


def call(*command: str, **environment: str) -> bool:
    """Run a command in the repository and return whether it succeeded."""
    print("+", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode == 0


def install_msgspec() -> None:
    """Install the dependency of kdfast that a machine for training often lacks, from the packed data's `needed`."""
    if importlib.util.find_spec("msgspec") is None:
        folder = str(packed_folder() / "needed")
        call(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--find-links", folder, "msgspec")


def with_pip(arguments: str) -> bool:
    """Install with pip."""
    options = ("--no-index", "--no-build-isolation", "--no-deps", "-e", ".")
    return call(sys.executable, "-m", "pip", "install", "-v", *options, CMAKE_ARGS=arguments)


def cuda_arguments(capability: str) -> str:
    """Return the options of CMake for a compute capability such as 90."""
    return f"-DKDFAST_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={capability}"


def cmake() -> str:
    """Return the path of CMake, which may be beside the interpreter alone."""
    found = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or sys.exit("cmake is not on PATH")


def configure(folder: Path, arguments: str) -> bool:
    """Configure the build in a folder."""
    import pybind11

    found = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    options = ("-DCMAKE_BUILD_TYPE=Release", *found, *arguments.split())
    return call(cmake(), "-S", str(ROOT), "-B", str(folder), *generator, *options)


def with_cmake(folder: Path, arguments: str) -> bool:
    """Build with CMake and put the extension beside the sources in one step."""
    return compiled(folder, arguments) and place(folder / EXTENSION)


def compiled(folder: Path, arguments: str) -> bool:
    """Build the extension in a folder."""
    return configure(folder, arguments) and call(cmake(), "--build", str(folder), "-j")


def keep(capability: str) -> None:
    """Build for a GPU that is not at hand, and keep the extension with the packed data."""
    folder = ROOT / "build" / f"kept-{capability}-{sysconfig.get_config_var('SOABI')}"
    if not compiled(folder, cuda_arguments(capability)):
        sys.exit("not built: see above")
    target = built_before(capability)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / EXTENSION, target)
    print(target)


def built_before(capability: str) -> Path:
    """Return where the extension of these sources, this Python and this GPU is kept."""
    sources = hash_sources(("csrc", "CMakeLists.txt", "pyproject.toml"))
    return packed_folder() / "built" / f"{sources}-sm{capability}" / EXTENSION


def place(extension: Path) -> bool:
    """Put an extension into the source tree."""
    target = ROOT / "kdfast" / extension.name
    shutil.copy(extension, f"{target}.new")
    os.replace(f"{target}.new", target)
    return True


def imported() -> str:
    """Return the file of the extension and whether it has CUDA kernels; the error if it does not import."""
    done = subprocess.run(
        [sys.executable, "-c", _CHECK], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()[-500:]


def main() -> None:
    """Build, check the import in a new process, and record how."""
    results = PartResults.from_environment()
    folder = Path(os.environ["QUEUE_WORK"]) / "build"
    started = time.perf_counter()
    install_msgspec()
    if results.device == "cpu":
        way = "configured" if configure(folder, "-DKDFAST_CUDA=OFF") else "failed"
        ready = way == "configured" and "_native" in imported()
    else:
        capability = "".join(map(str, torch.cuda.get_device_capability()))
        arguments = cuda_arguments(capability)
        before = built_before(capability)
        way = "built before" if before.exists() and place(before) and imported().endswith("True") else "pip"
        if way == "pip" and (not with_pip(arguments) or not imported().endswith("True")):
            way = "cmake" if with_cmake(folder, arguments) else "failed"
        ready = imported().endswith("True")
    results.add(results.run, way=way, seconds=round(time.perf_counter() - started, 1), extension=imported())
    if not ready:
        sys.exit("kdfast was not built: see the log above")


if __name__ == "__main__":
    keep(sys.argv[1]) if sys.argv[1:] else main()
