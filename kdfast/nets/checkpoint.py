"""Checkpoint files of kdfast: one network with everything needed to use it.

The file is a plain dict (format, version, net, classes, class_names, state_dict, mean, std, metadata, digest, seal),
saved by ``torch.save``, written atomically and read with ``weights_only=True``, so nothing in it can run code. For a
network of the user's own code, it also has the path and the digest of the file with that code, which runs only if the
process has named it.

The digest covers the weights and identifies a model: caches and runs record it. The seal covers everything in the file,
the digest included, and is compared on every load. Files of version 1 have no seal: the checksums of their archive are
compared instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, DataWarning, KdfastError, UsageError
from kdfast.files import atomic_write, schemas
from kdfast.files.validate import check_type
from kdfast.nets.foreign import check_archive, read_torch_file
from kdfast.nets.registry import NETS, build_net
from kdfast.nets.sources.own_code import find_code
from kdfast.nets.sources.reopen import choose_spec
from kdfast.nets.sources.spec import NetSpec, parse_spec

FORMAT = "kdfast-model"
VERSION = 2
_COUNTER = "num_batches_tracked"
_UNSEALED = 1  # the version before seals


@dataclass
class Model:
    """A trained network with its input normalization and class names.

    Attributes:
        net: The network.
        name: Its architecture, a name of `build_net`, with its arguments.
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
    content |= _code_fields(model.name)
    content["seal"] = _seal(content)
    with atomic_write(path) as file:
        torch.save(content, file)


def load_model(
    path: str | os.PathLike[str],
    *,
    classes: int | None = None,
    advice: str = "copy or train it again",
    net: str | None = None,
) -> Model:
    """Read a checkpoint that `save_model` wrote.

    Args:
        path: The file.
        classes: The required number of classes; None accepts any.
        advice: The end of messages about damage, what to do.
        net: The network that the file must hold, as for `build_net`. Naming code of your own allows the file to run it,
            as does having built the network before; arguments may be left out, because the file has them.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: The file is missing or damaged, contains code, is not a checkpoint of this version of kdfast,
            or holds another number of classes, another network or non-finite weights.
        UsageError: The network's package is not installed or does not work, or its own code is not named, not there or
            cannot be imported.
    """
    content = read_model_file(path, advice=advice)
    spec = choose_spec(path, content["net"], content.get("code"), net)
    if spec.kind == "name" and spec.member not in NETS:
        raise CheckpointError(
            f"{path} holds the network {spec.member!r}, which is not among those of kdfast: register it in "
            "kdfast.nets.NETS before, or update kdfast"
        )
    model = _model_from(path, content, spec, advice)
    check_finite(path, model.net.state_dict())
    if classes is not None and model.classes != classes:
        raise CheckpointError(
            f"{path} holds a network for {model.classes} classes, but the data has {classes}: "
            "use a network trained on this data"
        )
    return model


def read_model_file(path: str | os.PathLike[str], *, advice: str = "copy or train it again") -> dict[str, Any]:
    """Read and verify the content of a checkpoint that `save_model` wrote, without building its network.

    Raises:
        CheckpointError: As for `load_model`.
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
        _check_content(path, content, advice)
    except KdfastError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {advice}") from error
    return dict(content)


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


def _code_fields(name: str) -> dict[str, Any]:
    try:
        code = find_code(parse_spec(name))
    except UsageError:  # a module that a program built, whose class no name leads to
        return {}
    return {} if code is None else {"code": asdict(code)}


def _check_content(path: str | os.PathLike[str], content: Mapping[str, Any], advice: str) -> None:
    fields = {name: value for name, value in content.items() if name != "state_dict"}
    where = f"{path} is damaged"
    check_type(fields, schemas.ModelFields, where, error=CheckpointError, advice=advice)
    if len(content["class_names"]) != content["classes"]:
        raise ValueError(f"{len(content['class_names'])} class names for {content['classes']} classes")
    if digest_of(content["state_dict"]) != content["digest"]:
        raise CheckpointError(f"{where}: its weights do not match their digest; {advice}")
    if content["version"] != _UNSEALED and content.get("seal") != _seal(content):
        raise CheckpointError(f"{where}: its content does not match its seal; {advice}")


def _model_from(path: str | os.PathLike[str], content: Mapping[str, Any], spec: NetSpec, advice: str) -> Model:
    net = build_net(str(spec), content["classes"])
    code = find_code(spec)
    changed = code is not None and code.sha256 != (content.get("code") or {}).get("sha256")
    try:
        net.load_state_dict(content["state_dict"])
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:300]
        if code is None:
            raise CheckpointError(f"{path} is damaged ({reason}): {advice}") from error
        raise CheckpointError(
            f"{path} does not fit {code.file}{', which has changed since' if changed else ''} ({reason}): use the "
            "version that it was trained with"
        ) from error
    if changed and code is not None:
        warnings.warn(f"{code.file} has changed since {path} was written; its weights fit", DataWarning, stacklevel=3)
    mean, std = ([float(value) for value in content[key]] for key in ("mean", "std"))
    return Model(
        net=net.eval(),
        name=str(spec),
        classes=content["classes"],
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
