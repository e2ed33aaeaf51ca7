"""`kdfast doctor`: installed versions, and the backend of each operator with its reason."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

from kdfast.cli.output import say
from kdfast.cli.threads import describe_threads

PACKAGES = ("torch", "triton", "numpy", "numba", "ffcv", "tensorboard", "timm", "torchvision")


def doctor() -> None:
    """Print versions, devices, and the backend of every operator with its reason."""
    import torch

    import kdfast
    from kdfast.ops.backends import choices

    say(f"kdfast       {kdfast.__version__}, Python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        say(f"{package:<12} {_describe_package(package)}")
    say(f"cores        {describe_threads(torch.get_num_threads())}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    say(f"cuda         {', '.join(devices) if devices else 'no device'}")
    say(f"native       {_describe_extension()}")
    say("\noperator, device -> backend: reason")
    for choice in choices():
        say(f"  {choice.op}, {choice.device} -> {choice.backend}: {choice.reason}")
    if sys.platform != "linux":
        say("\nffcv and triton need Linux; the resident loader and the native kernels work here")


def _describe_extension() -> str:
    try:
        from kdfast.ops import native
    except ImportError as error:
        return (
            f"the compiled extension is not built ({error}): run pip install . in the source folder of kdfast, with a "
            "C++ compiler"
        )
    return f"instruction set {native.isa()}"


def _describe_package(package: str) -> str:
    from kdfast.nets.libraries import LIBRARIES, describe_misfit

    misfit = describe_misfit(package) if package in LIBRARIES else None
    return _version(package) + ("" if misfit is None else f": {misfit}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
