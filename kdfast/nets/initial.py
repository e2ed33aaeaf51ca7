"""Start a network from the weights of a file."""

from __future__ import annotations

import os
from collections.abc import Collection

from torch import nn

from kdfast.errors import CheckpointError
from kdfast.files import sha256_file
from kdfast.nets.checkpoint import check_finite, is_own_checkpoint, read_model_file
from kdfast.nets.head import find_classifier
from kdfast.nets.importing.matching import match_tensors
from kdfast.nets.importing.report import ImportReport
from kdfast.nets.importing.weights import find_weights, read_content, weights_file
from kdfast.nets.registry import build_net


def build_started_net(name: str, classes: int, init: str | None) -> nn.Module:
    """Build a network, and start it from the weights of a file if there is one; see `load_initial_weights`."""
    net = build_net(name, classes)
    if init is not None:
        load_initial_weights(net, init, name=name, classes=classes)
    return net


def load_initial_weights(net: nn.Module, path: str | os.PathLike[str], *, name: str, classes: int) -> tuple[str, ...]:
    """Load the weights of a file into a network, in place, without running code of the file.

    Names of layers are matched as for an import. Linear layers of as many outputs as the file has classes keep their
    initial weights where the data has another number of classes; so does a classifier that the file lacks.

    Args:
        net: The network.
        path: A checkpoint of kdfast or of other code, a .safetensors file, or a folder of Hugging Face with one.
        name: The network's architecture, for messages.
        classes: Number of classes.

    Returns:
        The names of the tensors that keep their initial weights.

    Raises:
        CheckpointError: The file is missing or damaged, contains code, holds weights that are not finite, or does not
            match the network.
    """
    file = weights_file(path)
    content = read_content(path, name)
    own = is_own_checkpoint(content)
    state = read_model_file(file)["state_dict"] if own else find_weights(content, file).tensors
    tensors, report = match_tensors(state, net, str(file), name, classes)
    kept = _kept(net, report, classes)
    unmatched = {*report.missing, *(key for key, _, _ in report.mismatched)} - {*kept}
    if unmatched or report.unexpected:
        raise CheckpointError(f"`init`: {report.summary()}".replace("\n  ", "; "))
    check_finite(file, tensors)
    net.load_state_dict(tensors, strict=False)
    return tuple(sorted(kept))


def digest_weights(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 (hexadecimal) of the file with the weights.

    Raises:
        CheckpointError: There is none.
        DataError: It cannot be read.
    """
    file = weights_file(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file}: pass the path of an existing file")
    return sha256_file(file)


def _kept(net: nn.Module, report: ImportReport, classes: int) -> Collection[str]:
    """Return the names of linear layers of another number of classes, and those of a classifier that is missing."""
    head = next(key for key, module in net.named_modules() if module is find_classifier(net))
    kept = {f"{head}.weight", f"{head}.bias"} & {*report.missing}
    linear = {key for key, module in net.named_modules() if isinstance(module, nn.Linear)}
    for key, given, need in report.mismatched:
        resized = given[1:] == need[1:] and given[0] == report.file_classes and need[0] == classes
        if resized and key.rpartition(".")[0] in linear:
            kept.add(key)
    return kept
