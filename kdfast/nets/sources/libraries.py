"""Networks of torchvision and timm, which may be absent or built for another torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any, cast

import torch
from torch import nn

from kdfast.errors import UsageError, did_you_mean

LIBRARIES = ("torchvision", "timm")
# Parts of torchvision.models whose networks do not map an image to logits.
_OTHER_TASKS = ("segmentation", "detection", "video", "optical_flow")


class LibraryError(UsageError):
    """A library of networks is not installed, or does not work with the installed torch."""


def build_library_net(library: str, member: str, classes: int) -> nn.Module:
    """Build a newly initialized network of torchvision or timm.

    Args:
        library: "torchvision" or "timm".
        member: A name of its ``list_models()``.
        classes: Width of the output.

    Raises:
        LibraryError: The library is not installed, or does not work.
        UsageError: There is no such library or network, it is no classifier, or it cannot be built.
    """
    if library not in LIBRARIES:
        raise UsageError(f"no library of networks is named {library!r}: use torchvision:NAME or timm:NAME")
    package, names = _open(library, member)
    if member not in names:
        raise UsageError(
            f"{library} has no network named {member!r}: {did_you_mean(member, names)}see its list_models()"
        )
    _check_task(library, package, member)
    try:
        if library == "torchvision":
            return cast(nn.Module, package.get_model(member, weights=None, num_classes=classes))
        return cast(nn.Module, package.create_model(member, pretrained=False, num_classes=classes))
    except Exception as error:  # the builders of hundreds of networks
        raise UsageError(
            f"{library}:{member} cannot be built as a classifier of {classes} classes ({_first_line(error)}): choose "
            "another network"
        ) from error


def describe_misfit(library: str) -> str | None:
    """Return why an installed torchvision or timm does not work with the installed torch; None if it does.

    It also returns None if the library is not installed.
    """
    if _version(library) is None:
        return None
    try:
        importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
    except Exception as error:
        return _misfit(library, error)
    needed = _required_torch() if library == "torchvision" else None
    if needed is not None and needed != _base(torch.__version__):
        return f"made for torch {needed}, installed is {torch.__version__}: {_advice()}"
    return None


def _open(library: str, member: str) -> tuple[Any, list[str]]:
    try:
        package = importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
        return package, list(package.list_models())
    except ModuleNotFoundError as error:
        if (error.name or library).partition(".")[0] == library:
            timm = "; pip install timm" if library == "timm" else ""
            raise LibraryError(
                f"{library}:{member} needs the package {library}: {_install_torchvision()}{timm}"
            ) from error
        raise LibraryError(f"{library}:{member}: {_misfit(library, error)}") from error
    except Exception as error:  # libraries built for another torch fail in many ways
        raise LibraryError(f"{library}:{member}: {_misfit(library, error)}") from error


def _misfit(library: str, error: Exception) -> str:
    version = _version(library) or "of unknown version"
    return (
        f"the installed {library} {version} does not work with torch {torch.__version__} ({_first_line(error)}): "
        f"{_advice()}"
    )


def _advice() -> str:
    """Return how to install the torchvision that belongs to the installed torch; timm imports it, too."""
    return f"install the torchvision of this torch: pip uninstall -y torchvision; {_install_torchvision()}"


def _install_torchvision() -> str:
    """Return the command that installs torchvision from where the installed torch came, and keeps that torch."""
    base, _, build = torch.__version__.partition("+")
    known = re.fullmatch(r"cpu|cu\d+|rocm[\d.]+", build)
    index = f" --index-url https://download.pytorch.org/whl/{build}" if known else ""
    return f"pip install torchvision torch=={base}{index}"


def _check_task(library: str, package: Any, member: str) -> None:
    if library != "torchvision":
        return
    for task in _OTHER_TASKS:
        part = getattr(package, task, None)
        if part is not None and member in package.list_models(module=part):
            raise UsageError(
                f"torchvision:{member} is a network for {task.replace('_', ' ')}, not a classifier of images: choose "
                "one of list_models(module=torchvision.models)"
            )


def _required_torch() -> str | None:
    """Return the torch version that torchvision's own metadata names; None if they name none."""
    for requirement in importlib.metadata.requires("torchvision") or ():
        if match := re.match(r"torch\s*\(?==\s*([\d.]+)", requirement):
            return match[1]
    return None


def _base(version: str) -> str:
    return version.partition("+")[0]


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
