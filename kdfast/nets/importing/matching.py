"""Match a foreign state dict to a network: find its wrapper, translate layer names, and report the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache

from torch import Tensor, nn

from kdfast.errors import CheckpointError
from kdfast.nets.head import find_classifier
from kdfast.nets.importing.leftovers import find_harmless, find_normalization
from kdfast.nets.importing.prefixes import find_wrapper
from kdfast.nets.importing.report import ImportReport
from kdfast.nets.registry import NETS, Builder

_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "encoder.")
# Names of the same part in public code bases; each is tried under the other names of its group.
_SYNONYMS = (
    ("fc", "linear", "classifier", "head", "output", "last_linear"),
    ("downsample", "shortcut", "convShortcut", "skip"),
    ("conv1", "conv_1_3x3"),
    ("bn1", "bn_1"),
    ("layer1", "stage_1", "stage1", "block1"),
    ("layer2", "stage_2", "stage2", "block2"),
    ("layer3", "stage_3", "stage3", "block3"),
)
_COUNTER = "num_batches_tracked"

Renamed = dict[str, tuple[str, Tensor]]  # name in the network, or stripped foreign name -> (foreign name, tensor)


def match_tensors(
    state: Mapping[str, Tensor], net: nn.Module, path: str, name: str, classes: int
) -> tuple[dict[str, Tensor], ImportReport]:
    """Rename the tensors of a foreign state dict to match a network.

    A name that the network has is kept. Otherwise wrapper prefixes are stripped and synonyms of layer names tried. A
    classifier is recognized under any name, if it is the only part left on both sides. Left out are counters, losses
    and copies of the network. A first convolution with one input channel is spread evenly over three, which computes
    the same for gray images.

    Args:
        state: Foreign name -> tensor.
        net: The network to match; it is not changed.
        path: The file, for the report.
        name: The network's architecture, for the report.
        classes: Number of classes, for the report.

    Returns:
        The matching tensors under the names of the network, and the report.

    Raises:
        CheckpointError: The file holds several networks, or several normalizations of the input, or two of its tensors
            match the same one of the network.
    """
    target = {key: tensor for key, tensor in net.state_dict().items() if not key.endswith(_COUNTER)}
    given = {key: tensor for key, tensor in state.items() if not key.endswith(_COUNTER)}
    harmless = find_harmless(given, target)
    wrapper, copies = find_wrapper({k: t for k, t in given.items() if k not in harmless}, target, path)
    left_out = {*harmless, *copies}
    given = {key: tensor for key, tensor in given.items() if key not in left_out}
    head = next(key for key, module in net.named_modules() if module is find_classifier(net))
    renamed = _name_head(_rename(given, target, wrapper), target, head)
    gray = _spread_gray(renamed, target)
    unexpected = [old for new, (old, _) in renamed.items() if new not in target]
    normalization = find_normalization(given, unexpected, path)
    if normalization is not None and normalization.value is not None:
        unexpected = [old for old in unexpected if old not in normalization.names]
    matched = {new: t for new, (_, t) in renamed.items() if new in target and target[new].shape == t.shape}
    file_head = renamed.get(f"{head}.weight")
    report = ImportReport(
        path=path,
        net=name,
        classes=classes,
        matched=len(matched),
        renamed=tuple((old, new) for new, (old, _) in renamed.items() if old != new and new in matched),
        missing=tuple(key for key in target if key not in renamed),
        unexpected=tuple(unexpected),
        mismatched=tuple(
            (new, tuple(t.shape), tuple(target[new].shape))
            for new, (_, t) in renamed.items()
            if new in target and new not in matched
        ),
        file_classes=None if file_head is None else int(file_head[1].shape[0]),
        removable=_patterns(unexpected, {*given} - {*unexpected}),
        left_out=tuple(key for key in state if key in left_out),
        gray=gray,
        normalization=normalization,
    )
    if not report.complete:
        report = replace(report, alternatives=_matching_nets(given, report.file_classes or classes))
    return _with_counters(matched, state, wrapper, net), report


def _with_counters(
    matched: dict[str, Tensor], state: Mapping[str, Tensor], wrapper: str, net: nn.Module
) -> dict[str, Tensor]:
    """Add the batch counters, which many files lack."""
    names = net.state_dict()
    counters = {_canonical(old, t, names, wrapper): t for old, t in state.items() if old.endswith(_COUNTER)}
    return matched | {new: t for new, t in counters.items() if new in names and names[new].shape == t.shape}


def _rename(state: Mapping[str, Tensor], target: Mapping[str, Tensor], wrapper: str) -> Renamed:
    renamed: Renamed = {}
    for old, tensor in state.items():
        new = _canonical(old, tensor, target, wrapper)
        if new in renamed:
            raise CheckpointError(
                f"tensors {renamed[new][0]!r} and {old!r} of the checkpoint both match {new!r}: it holds two networks; "
                "leave one out with `ignore`, or save one alone"
            )
        renamed[new] = (old, tensor)
    return renamed


def _canonical(name: str, tensor: Tensor, target: Mapping[str, Tensor], wrapper: str = "") -> str:
    stripped = name if name in target else name.removeprefix(wrapper)
    while stripped not in target and (prefix := next((p for p in _PREFIXES if stripped.startswith(p)), None)):
        stripped = stripped[len(prefix) :]
    if stripped in target:
        return stripped
    spellings = [stripped.split(".")]
    for position, part in enumerate(spellings[0]):
        others = [other for group in _SYNONYMS if part in group for other in group if other != part]
        spellings += [[*s[:position], other, *s[position + 1 :]] for s in spellings for other in others]
    known = [spelling for spelling in map(".".join, spellings) if spelling in target]
    same_shape = [spelling for spelling in known if target[spelling].shape == tensor.shape]
    return next(iter(same_shape or known), stripped)


def _name_head(renamed: Renamed, target: Mapping[str, Tensor], head: str) -> Renamed:
    """Rename the only linear layer left in the file to the classifier, if it is all that the network lacks."""
    missing = {key for key in target if key not in renamed}
    if not missing or {f"{head}.weight", f"{head}.bias"} & {*target} != missing:
        return renamed
    left = [key for key in renamed if key not in target]
    layers = [key.removesuffix(".weight") for key in left if key.endswith(".weight") and renamed[key][1].ndim == 2]
    if len(layers) != 1 or renamed[f"{layers[0]}.weight"][1].shape[1] != target[f"{head}.weight"].shape[1]:
        return renamed
    names = {f"{layers[0]}{part}": f"{head}{part}" for part in (".weight", ".bias") if f"{head}{part}" in missing}
    if not names.keys() <= {*left}:
        return renamed
    return {names.get(new, new): entry for new, entry in renamed.items()}


def _spread_gray(renamed: Renamed, target: Mapping[str, Tensor]) -> str | None:
    """Spread the only convolution with one input channel in place of three over these; return its name."""
    found = [
        new
        for new, (_, t) in renamed.items()
        if new in target and t.ndim == 4 and t.shape[1] == 1 and target[new].shape == (t.shape[0], 3, *t.shape[2:])
    ]
    if len(found) != 1:
        return None
    old, tensor = renamed[found[0]]
    renamed[found[0]] = (old, tensor.expand(target[found[0]].shape) / 3)
    return found[0]


def _patterns(unexpected: Collection[str], others: Collection[str]) -> tuple[str, ...]:
    """Return patterns that match the unexpected names and no other, the shortest that name whole modules."""
    found: dict[str, None] = {}
    for name in unexpected:
        parts = name.split(".")
        starts = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
        start = next((s for s in starts if not any(other.startswith(s) for other in others)), None)
        found[name if start is None else f"{start}*"] = None
    return tuple(found)


def _matching_nets(state: Mapping[str, Tensor], classes: int) -> tuple[str, ...]:
    """Return the networks of NETS that these tensors match exactly."""
    names = []
    for name, builder in NETS.items():
        target = _skeleton(builder, max(2, classes))
        if len(target) != len(state):
            continue
        renamed = {_canonical(old, tensor, target): tensor.shape for old, tensor in state.items()}
        if renamed == {key: tensor.shape for key, tensor in target.items()}:
            names.append(name)
    return tuple(names)


@cache
def _skeleton(builder: Builder, classes: int) -> dict[str, Tensor]:
    """Return the tensors of a network without their values."""
    state = builder(classes).state_dict()
    return {key: tensor.to("meta") for key, tensor in state.items() if not key.endswith(_COUNTER)}
