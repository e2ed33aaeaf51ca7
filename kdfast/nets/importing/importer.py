"""Import a checkpoint into a model: weights, input normalization and class names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, UsageError
from kdfast.nets.checkpoint import Model, check_finite, is_own_checkpoint, load_model
from kdfast.nets.head import reorder_classifier
from kdfast.nets.importing.leftovers import StoredNormalization, drop_ignored
from kdfast.nets.importing.matching import match_tensors
from kdfast.nets.importing.prefixes import select_prefix
from kdfast.nets.importing.report import ImportReport
from kdfast.nets.importing.weights import find_weights, read_content
from kdfast.nets.registry import build_net

# Largest difference to the values in a file that counts as rounding: publications give three digits.
_ROUNDING = 1e-3
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def import_checkpoint(
    path: str | os.PathLike[str],
    *,
    net: str,
    classes: int,
    normalization: Normalization | None = None,
    class_names: Sequence[str] | None = None,
    key: str | None = None,
    prefix: str | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Model, ImportReport]:
    """Import a checkpoint that other code wrote, without running code in it; or one of kdfast for renamed classes.

    A checkpoint of kdfast keeps its normalization. Its outputs are brought into the order of `class_names` if these are
    its class names in another order; otherwise `class_names` replace them one by one.

    Args:
        path: A .safetensors file, or a ``torch.save`` file (.pt, .pth, .th, ...) with a state dict, bare or in a dict;
            or the folder of a Hugging Face model, which has one of these.
        net: The architecture, a name of `build_net`.
        classes: Number of classes.
        normalization: Input normalization used in training; None if the file holds it. A wrong one silently costs
            accuracy: check with `kdfast.teacher.evaluate.evaluate`.
        class_names: One name for each class; None for "0", "1", ..., or those of a checkpoint of kdfast.
        key: Key of the weights in the file's dict ("a.b" for nested dicts); None searches under common names.
        prefix: Import only tensors whose names start with this, for files that hold several networks.
        ignore: Names of tensors to leave out, in which * and ? stand for any text and any character.

    Returns:
        The model in evaluation mode on the CPU, and a report of the matching.

    Raises:
        CheckpointError: The file is missing, damaged or contains code, its tensors do not match the network exactly,
            a weight is NaN or infinite, or the file holds another normalization.
        UsageError: There is no such network, the number of class names is not `classes`, a pattern of `ignore` matches
            nothing, or the normalization is unknown.
    """
    if class_names is not None and len(class_names) != classes:
        raise UsageError(
            f"`class_names` has {len(class_names)} names for {classes} classes: pass one name for each class"
        )
    content = read_content(path, net)
    if key is None and prefix is None and is_own_checkpoint(content):
        return _import_own(path, net, classes, normalization, class_names)
    module = build_net(net, classes)
    found = find_weights(content, path, key)
    state = drop_ignored(found.tensors, ignore, str(path))
    if prefix is not None:
        state = select_prefix(state, prefix, str(path))
    tensors, report = match_tensors(state, module, str(path), net, classes)
    notes = [f"also in the file, not used: {', '.join(found.others)}"] if found.others else []
    report = report.with_notes(notes)
    if not report.complete:
        raise CheckpointError(report.summary().replace("\n  ", "; "))
    _check_numbers(path, tensors, module.state_dict())
    check_finite(path, tensors)
    normalization = _resolve_normalization(normalization, report.normalization, path)
    if report.gray is not None:
        _check_gray(normalization, report.gray)
    # Batch counters may be absent from the file; match_tensors has checked everything else.
    module.load_state_dict(tensors, strict=False)
    names = tuple(map(str, range(classes))) if class_names is None else tuple(class_names)
    metadata = {"imported_from": Path(path).name}
    return Model(module.eval(), net, classes, names, normalization, metadata), report


def _check_numbers(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that tensors hold the numbers of the network, where copying would change them or fail.

    Raises:
        CheckpointError: One is quantized, sparse, without values, or of integers or complex numbers.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            kind = "a sparse tensor"
        elif tensor.is_meta:
            kind = "a tensor without values (of the device meta)"
        elif wanted[name].is_floating_point() and (tensor.is_quantized or tensor.dtype not in _FLOATS):
            kind = str(tensor.dtype).removeprefix("torch.")
        else:
            continue
        raise CheckpointError(
            f"{path} holds {name} as {kind}, not as plain floating-point numbers: save the weights as float32 tensors "
            "(quantized ones dequantized, sparse ones dense), or use another checkpoint"
        )


def _resolve_normalization(
    given: Normalization | None, stored: StoredNormalization | None, path: str | os.PathLike[str]
) -> Normalization:
    if stored is None or stored.value is None:
        if given is None:
            raise UsageError(
                f"`normalization` is not given and {path} holds none: pass the mean and the standard deviation that "
                "the teacher was trained with"
            )
        return given
    if given is None:
        return stored.value
    if stored.is_identity:
        return given
    if not _close(given, stored.value):
        raise CheckpointError(
            f"{path} holds the {stored.describe()}; but `normalization` says mean {_rounded(given.mean)}, std "
            f"{_rounded(given.std)}: omit it to use the file's"
        )
    return stored.value


def _close(first: Normalization, second: Normalization) -> bool:
    pairs = zip((*first.mean, *first.std), (*second.mean, *second.std), strict=True)
    return all(abs(a - b) <= _ROUNDING for a, b in pairs)


def _rounded(values: Sequence[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def _check_gray(normalization: Normalization, layer: str) -> None:
    if len(set(normalization.mean)) > 1 or len(set(normalization.std)) > 1:
        raise UsageError(
            f"the teacher was trained on gray images ({layer} has one input channel), but `normalization` differs "
            f"between channels ({_rounded(normalization.mean)} and {_rounded(normalization.std)}): pass one mean and "
            "one standard deviation"
        )


def _import_own(
    path: str | os.PathLike[str],
    net: str,
    classes: int,
    normalization: Normalization | None,
    class_names: Sequence[str] | None,
) -> tuple[Model, ImportReport]:
    model = load_model(path, classes=classes, net=net)
    stored = StoredNormalization(("mean", "std"), model.normalization)
    _resolve_normalization(normalization, stored, path)
    old, new = model.class_names, model.class_names if class_names is None else tuple(class_names)
    notes = []
    if old != new and sorted(old) == sorted(new) and len(set(old)) == classes:
        reorder_classifier(model.net, model.name, [old.index(name) for name in new])
        notes.append(f"outputs reordered by name: {', '.join(new[:8])}{', ...' if classes > 8 else ''}")
    elif old != new:
        changed = [f"{a} -> {b}" for a, b in zip(old, new, strict=True) if a != b]
        notes.append(f"classes renamed in place: {', '.join(changed[:8])}{', ...' if len(changed) > 8 else ''}")
    model.class_names = new
    model.metadata["imported_from"] = Path(path).name
    report = ImportReport(path=str(path), net=net, classes=classes, matched=len(model.net.state_dict()))
    return model, report.with_notes(notes)
