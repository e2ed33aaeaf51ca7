"""Networks of torchvision and timm, which may be absent or built for another torch; so may transformers."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from kdfast.errors import UsageError, did_you_mean

# Library -> the module that has its networks.
LIBRARIES = {"torchvision": "torchvision.models", "timm": "timm", "transformers": "transformers"}
# Arguments that load weights, from the network for some. A checkpoint must not bring that about.
_LOADING = ("weights", "weights_backbone", "pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay",
            "cache_dir", "num_classes")  # fmt: skip
# Parts of torchvision.models whose networks do not map an image to logits.
_OTHER_TASKS = ("segmentation", "detection", "video", "optical_flow")


class LibraryError(UsageError):
    """A library of networks is not installed, or does not work with the installed torch."""


def build_library_net(library: str, member: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a newly initialized network of torchvision or timm.

    Args:
        library: "torchvision" or "timm".
        member: A name of its ``list_models()``, of timm also with a tag, as in "resnet18.a1_in1k".
        classes: Width of the output.
        arguments: Keyword arguments for the library's builder.

    Raises:
        LibraryError: The library is not installed, or does not work.
        UsageError: There is no such network, it is no classifier, or it cannot be built.
    """
    package = open_library(library, f"{library}:{member}")
    names = _list_models(library, package)
    if (member.partition(".")[0] if library == "timm" else member) not in names:
        raise UsageError(
            f"{library} has no network named {member!r}: {did_you_mean(member, names)}see its list_models()"
        )
    _check_task(library, package, member)
    check_not_loading(f"{library}:{member}", arguments)
    try:
        if library == "torchvision":
            return cast(nn.Module, package.get_model(member, weights=None, num_classes=classes, **arguments))
        return cast(nn.Module, package.create_model(member, pretrained=False, num_classes=classes, **arguments))
    except Exception as error:  # the builders of hundreds of networks
        remedy = "change `net_arg`, or choose another network" if arguments else "choose another network"
        raise UsageError(
            f"{library}:{member} cannot be built as a classifier of {classes} classes ({first_line(error)}): {remedy}"
        ) from error


def check_not_loading(name: str, arguments: Mapping[str, Any]) -> None:
    """Check that no argument loads weights or sets the number of classes.

    Raises:
        UsageError: One does.
    """
    for argument in arguments:
        if argument in _LOADING:
            remedy = (
                "it is that of the data"
                if argument == "num_classes"
                else "start from the weights of a file with `init`"
            )
            raise UsageError(f"`net_arg` {argument} is not for {name}: omit it; {remedy}")


def describe_misfit(library: str) -> str | None:
    """Return why an installed library of networks does not work with the installed torch; None if it does.

    It also returns None if the library is not installed.
    """
    if _version(library) is None:
        return None
    try:
        importlib.import_module(LIBRARIES[library])
    except Exception as error:
        return _misfit(library, error)
    needed = _required_torch() if library == "torchvision" else None
    if needed is not None and needed != _base(torch.__version__):
        return f"made for torch {needed}, installed is {torch.__version__}: {_advice()}"
    return None


def open_library(library: str, name: str) -> Any:
    """Import the module that has a library's networks.

    Args:
        library: A key of LIBRARIES.
        name: The network that needs it, for messages.

    Raises:
        LibraryError: The library is not installed, or does not work.
    """
    try:
        return importlib.import_module(LIBRARIES[library])
    except ModuleNotFoundError as error:
        if (error.name or library).partition(".")[0] == library:
            raise LibraryError(f"{name} needs the package {library}: {_install(library)}") from error
        raise LibraryError(f"{name}: {_misfit(library, error)}") from error
    except Exception as error:  # libraries built for another torch fail in many ways
        raise LibraryError(f"{name}: {_misfit(library, error)}") from error


def _list_models(library: str, package: Any) -> list[str]:
    try:
        return list(package.list_models())
    except Exception as error:  # libraries built for another torch fail in many ways
        raise LibraryError(f"{library}: {_misfit(library, error)}") from error


def _install(library: str) -> str:
    if library == "transformers":
        return "pip install transformers"
    return _install_torchvision() + ("; pip install timm" if library == "timm" else "")


def _misfit(library: str, error: Exception) -> str:
    version = _version(library) or "of unknown version"
    return (
        f"the installed {library} {version} does not work with torch {torch.__version__} ({first_line(error)}): "
        f"{_advice()}"
    )


def _advice() -> str:
    """Return how to install the torchvision that belongs to the installed torch; the others import it, too."""
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


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class without one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
