"""kdfast's own checkpoint file, one network with all that is needed to use it, and the import of foreign ones.

The file is what ``torch.save`` makes of a plain dict (format, version, net, classes, class_names, state_dict, mean,
std, metadata, digest), written atomically and read with ``weights_only=True``: nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, UsageError
from kdfast.files import atomic_write
from kdfast.nets.foreign import read_tensors, read_torch_file
from kdfast.nets.matching import ImportReport, match_tensors
from kdfast.nets.registry import build_net

FORMAT = "kdfast-model"
VERSION = 1


@dataclass
class Model:
    """A trained network together with what it must be fed and what it answers.

    Attributes:
        net: The network.
        name: Its architecture, as `build_net` knows it.
        classes: Width of its output.
        class_names: One name for each class.
        normalization: Mean and standard deviation of its inputs, channel by channel, on the scale 0 to 1.
        metadata: Anything that JSON can hold.
    """

    net: nn.Module
    name: str
    classes: int
    class_names: tuple[str, ...]
    normalization: Normalization
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over every tensor of the state dict in the order of names: name, dtype, shape, bytes."""
        return digest_of(self.net.state_dict())


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) of named tensors, whatever their order, device and memory format.

    Batch counters (``num_batches_tracked``) are left out: they change no output, and many checkpoints lack them.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(path: str | os.PathLike[str], model: Model) -> None:
    """Write a model's checkpoint, atomically.

    Raises:
        UsageError: The metadata holds something JSON cannot, or the class names do not fit the number of classes.
        OutputError: The file cannot be written.
    """
    if len(model.class_names) != model.classes:
        raise UsageError(f"{len(model.class_names)} class names for a network with {model.classes} classes")
    try:
        metadata = json.loads(json.dumps(model.metadata))
    except (TypeError, ValueError) as error:
        raise UsageError(f"a checkpoint's metadata must be plain JSON values: {error}") from error
    content = {
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
    with atomic_write(path) as file:
        torch.save(content, file)


def load_model(path: str | os.PathLike[str], *, net: str | None = None, classes: int | None = None) -> Model:
    """Read a checkpoint that `save_model` wrote.

    Args:
        path: The file.
        net: The architecture it must hold, when the caller knows.
        classes: The number of classes it must have, when the caller knows.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, carries code, is not kdfast's or of another version, or holds
            another architecture or number of classes, or weights that are not finite.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no kdfast checkpoint: a foreign one needs an import first (kdfast teacher import)"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content.get('version')!r}; needed: version {VERSION}; "
            "update kdfast or write the file again"
        )
    try:
        model = _model_from(content)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy or train it again") from error
    if model.digest != content.get("digest"):
        raise CheckpointError(f"{path} is damaged: its weights do not match their digest; copy or train it again")
    _refuse_not_finite(path, model.net.state_dict())
    _check_wanted(Path(path), model, net, classes)
    return model


def _model_from(content: Mapping[str, Any]) -> Model:
    classes = int(content["classes"])
    net = build_net(content["net"], classes)
    net.load_state_dict(content["state_dict"])
    if len(content["class_names"]) != classes:
        raise ValueError(f"{len(content['class_names'])} class names for {classes} classes")
    mean, std = ([float(value) for value in content[key]] for key in ("mean", "std"))
    return Model(
        net=net.eval(),
        name=content["net"],
        classes=classes,
        class_names=tuple(content["class_names"]),
        normalization=Normalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2])),
        metadata=dict(content["metadata"]),
    )


def _refuse_not_finite(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    damaged = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if damaged:
        raise CheckpointError(
            f"{path} holds NaN or infinite weights in {', '.join(damaged[:4])}: its training diverged; use another"
        )


def _check_wanted(path: Path, model: Model, net: str | None, classes: int | None) -> None:
    if net is not None and model.name != net:
        raise CheckpointError(
            f"{path} holds a {model.name}, but a {net} is needed: give its own checkpoint, or ask for {model.name}"
        )
    if classes is not None and model.classes != classes:
        raise CheckpointError(
            f"{path} holds a network for {model.classes} classes, but {classes} are needed: "
            "give a network trained on this data"
        )


def import_checkpoint(
    path: str | os.PathLike[str],
    *,
    net: str,
    classes: int,
    normalization: Normalization,
    class_names: Sequence[str] | None = None,
    key: str | None = None,
) -> tuple[Model, ImportReport]:
    """Bring in a checkpoint that other code wrote, without running anything in it.

    Args:
        path: A .safetensors file, or what ``torch.save`` wrote (.pt, .pth, .th, ...): a state dict, or a dict with one
            inside.
        net: The architecture, as `build_net` knows it.
        classes: Number of classes.
        normalization: What its inputs were normalised with in training. It cannot be seen from the weights, and a
            wrong one costs accuracy silently: check with `kdfast.teacher.evaluate`.
        class_names: One name for each class; "0", "1", ... when not given.
        key: Where in the file's dict the weights are ("a.b" for nested dicts), if the usual places do not find them.

    Returns:
        The model in evaluation mode on the CPU, and a report of what was renamed.

    Raises:
        CheckpointError: The file is missing, damaged or carries code; or its tensors do not fill the network exactly;
            or a weight is NaN or infinite.
        UsageError: No such network, or the number of class names is not `classes`.
    """
    names = tuple(str(index) for index in range(classes)) if class_names is None else tuple(class_names)
    if len(names) != classes:
        raise UsageError(f"{len(names)} class names for a network with {classes} classes: give one name for each class")
    module = build_net(net, classes)
    tensors, report = match_tensors(read_tensors(path, key), module, str(path), net, classes)
    if not report.complete:
        raise CheckpointError(report.summary().replace("\n  ", "; "))
    _refuse_not_finite(path, tensors)
    # Batch counters may be absent from the file; match_tensors has seen to all the rest.
    module.load_state_dict(tensors, strict=False)
    metadata = {"imported_from": Path(path).name}
    return Model(module.eval(), net, classes, names, normalization, metadata), report
