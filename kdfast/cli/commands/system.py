"""`kdfast --version`; `kdfast doctor`: installed versions, and the backend of each operator with its reason."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Annotated

import typer

from kdfast.cli.output import say, show
from kdfast.cli.threads import describe_threads

PACKAGES = ("torch", "triton", "numpy", "numba", "ffcv", "tensorboard", "timm", "torchvision", "transformers")


def _print_version(context: typer.Context, asked: bool) -> None:
    import kdfast

    if asked:
        say(f"kdfast {kdfast.__version__}")
        context.exit()


def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Distill a trained teacher into a smaller student, on less data."""


def doctor() -> None:
    """Print versions, devices, and the backend of every operator with its reason."""
    import torch

    import kdfast
    from kdfast.ops.backends import choices

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "kdfast": f"{kdfast.__version__}, Python {platform.python_version()} on {platform.platform()}",
        **{package: _describe_package(package) for package in PACKAGES},
        "cores": describe_threads(torch.get_num_threads()),
        "cuda": ", ".join(devices) if devices else "no device",
        "native": _describe_extension(),
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    lines.append("\noperator, device -> backend: reason")
    lines += [f"  {choice.op}, {choice.device} -> {choice.backend}: {choice.reason}" for choice in choices()]
    if sys.platform != "linux":
        lines.append("\nffcv and triton need Linux; the resident loader and the native kernels work here")
    operators = [
        {"op": choice.op, "device": choice.device, "backend": choice.backend, "reason": choice.reason}
        for choice in choices()
    ]
    show("\n".join(lines), {**facts, "operators": operators})


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
    from kdfast.nets.sources.libraries import LIBRARIES, describe_misfit

    misfit = describe_misfit(package) if package in LIBRARIES else None
    return _version(package) + ("" if misfit is None else f": {misfit}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
