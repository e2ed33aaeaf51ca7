"""Checkpoint files of kdfast: one network with everything needed to use it.

The file is a plain dict (format, version, net, classes, class_names, state_dict, mean, std, metadata, digest, seal),
saved by ``torch.save``, written atomically and read with ``weights_only=True``, so nothing in it can run code.

The digest covers the weights and identifies a model: caches and runs record it. The seal covers everything in the file,
the digest included, and is compared on every load. Files of version 1 have no seal: the checksums of their archive are
compared instead.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, UsageError
from kdfast.files import atomic_write, schemas
from kdfast.files.validate import check_type
from kdfast.nets.foreign import check_archive, read_torch_file
from kdfast.nets.sources.libraries import LibraryError
from kdfast.nets.registry import build_net

FORMAT = "kdfast-model"
VERSION = 2
_COUNTER = "num_batches_tracked"
_UNSEALED = 1  # the version before seals


@dataclass
class Model:
    """A trained network with its input normalization and class names.

    Attributes:
        net: The network.
        name: Its architecture, a name of `build_net`.
        classes: Number of classes.
        class_names: One name for each class.
        normalization: Mean and standard deviation of its input channels, on the scale 0 to 1.
        metadata: JSON values.
    """

    net: nn.Module
    name: str
    classes: int
    class_names: tuple[str, ...]
    normalization: Normalization
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the state dict: name, dtype, shape and bytes of each tensor, in the order of names."""
        return digest_of(self.net.state_dict())


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hexadecimal) of named tensors, independent of their order, device and memory format.

    Batch counters (``num_batches_tracked``) are omitted: they affect no output, and many checkpoints lack them.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.endswith(_COUNTER):
            continue
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(path: str | os.PathLike[str], model: Model) -> None:
    """Write the checkpoint of a model, atomically.

    Raises:
        UsageError: The metadata are not JSON values, or the number of class names is not the number of classes.
        OutputError: The file cannot be written.
    """
    if len(model.class_names) != model.classes:
        raise UsageError(
            f"{len(model.class_names)} class names for {model.classes} classes: pass one name for each class"
        )
    try:
        metadata = json.loads(json.dumps(model.metadata))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the metadata of a checkpoint must be plain JSON values: {error}") from error
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "net": model.name,
        "classes": model.classes,
        "class_names": list(model.class_names),
        "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in model.net.state_dict().items()},
        "mean": list(model.normalization.mean),
        "std": list(model.normalization.std),
        "metadata": metadata,
        "digest": model.digest,
    }
    content["seal"] = _seal(content)
    with atomic_write(path) as file:
        torch.save(content, file)


def load_model(
    path: str | os.PathLike[str], *, classes: int | None = None, advice: str = "copy or train it again"
) -> Model:
    """Read a checkpoint that `save_model` wrote.

    Args:
        path: The file.
        classes: The required number of classes; None accepts any.
        advice: The end of messages about damage, what to do.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: The file is missing or damaged, contains code, is not a checkpoint of this version of kdfast,
            or holds another number of classes or non-finite weights.
        UsageError: The network's package is not installed or does not work.
    """
    content = read_torch_file(path, advice=advice)
    if not is_own_checkpoint(content):
        raise CheckpointError(
            f"{path} is not a kdfast checkpoint: import a foreign one first with kdfast teacher import"
        )
    version = content.get("version")
    if version not in (VERSION, _UNSEALED):
        raise CheckpointError(
            f"{path} has checkpoint version {version!r}, which is none of {_UNSEALED} and {VERSION}: update kdfast or "
            "write the file again"
        )
    try:
        if version == _UNSEALED:
            check_archive(path, advice)
        model = _model_from(path, content, advice)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, (CheckpointError, LibraryError)):
            raise
        raise CheckpointError(f"{path} is damaged ({error}): {advice}") from error
    check_finite(path, model.net.state_dict())
    if classes is not None and model.classes != classes:
        raise CheckpointError(
            f"{path} holds a network for {model.classes} classes, but the data has {classes}: "
            "use a network trained on this data"
        )
    return model


def is_own_checkpoint(content: Any) -> bool:
    """Return whether this is what a file of `save_model` holds."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def _seal(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hexadecimal) of everything in a file but the weights, for which their digest stands.

    Batch counters, which the digest omits, are part of it.
    """
    fields = {name: value for name, value in content.items() if name not in ("state_dict", "seal")}
    counters = {name: t.tolist() for name, t in content["state_dict"].items() if name.endswith(_COUNTER)}
    return hashlib.sha256(json.dumps([fields, counters], sort_keys=True).encode()).hexdigest()


def _model_from(path: str | os.PathLike[str], content: Mapping[str, Any], advice: str) -> Model:
    fields = {name: value for name, value in content.items() if name != "state_dict"}
    where = f"{path} is damaged"
    check_type(fields, schemas.ModelFields, where, error=CheckpointError, advice=advice)
    state, classes = content["state_dict"], content["classes"]
    if len(content["class_names"]) != classes:
        raise ValueError(f"{len(content['class_names'])} class names for {classes} classes")
    if digest_of(state) != content["digest"]:
        raise CheckpointError(f"{where}: its weights do not match their digest; {advice}")
    if content["version"] != _UNSEALED and content.get("seal") != _seal(content):
        raise CheckpointError(f"{where}: its content does not match its seal; {advice}")
    net = build_net(content["net"], classes)
    net.load_state_dict(state)
    mean, std = ([float(value) for value in content[key]] for key in ("mean", "std"))
    return Model(
        net=net.eval(),
        name=content["net"],
        classes=classes,
        class_names=tuple(content["class_names"]),
        normalization=Normalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2])),
        metadata=dict(content["metadata"]),
    )


def check_finite(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Check that all weights are finite.

    Raises:
        CheckpointError: One is not; the message names the tensors.
    """
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(
            f"{path} holds NaN or infinite weights in {', '.join(bad[:4])}: its training diverged; use another"
        )
