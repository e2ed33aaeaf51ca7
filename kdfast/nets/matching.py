"""Match a foreign state dict to a network: strip wrapper prefixes, translate layer names, and report the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from kdfast.errors import CheckpointError
from kdfast.nets.head import find_classifier
from kdfast.nets.registry import NETS, build_net

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
_SHOWN = 6


@dataclass(frozen=True)
class ImportReport:
    """Match between the tensors of a foreign checkpoint and a network.

    Attributes:
        path: The file.
        net: The requested architecture.
        classes: The requested number of classes.
        matched: Number of tensors that match.
        renamed: (name in the file, name in the network) if they differ.
        missing: Names in the network that the file lacks.
        unexpected: Names in the file that the network lacks.
        mismatched: (name in the network, shape in the file, shape needed).
        file_classes: Number of classes of the file's classifier; None without one under a known name.
        alternatives: Names of networks that the file matches with its own number of classes; determined only if the
            file does not match.
    """

    path: str
    net: str
    classes: int
    matched: int
    renamed: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    file_classes: int | None = None
    alternatives: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the file matches the network exactly: nothing missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return a few lines: the outcome and what to do, then examples of each difference."""
        if self.complete:
            lines = [f"{self.path}: all {self.matched} tensors of {self.net} ({self.classes} classes) found"]
        else:
            lines = [f"{self.path} does not match {self.net} with {self.classes} classes: {self._remedy()}"]
        lines += _examples("missing", self.missing)
        lines += _examples("unexpected", self.unexpected)
        lines += _examples(
            "other shape", [f"{name}: {given}, expected {need}" for name, given, need in self.mismatched]
        )
        if self.complete:
            lines += _examples("renamed", [f"{old} -> {new}" for old, new in self.renamed])
        return "\n".join(lines)

    def _remedy(self) -> str:
        other_classes = self.file_classes is not None and self.file_classes != self.classes
        if self.alternatives:
            found = f"it holds {' or '.join(self.alternatives)} with {self.file_classes or self.classes} classes"
            return f"{found}; use one trained on this data" if other_classes else f"{found}; set `net` to that network"
        if other_classes:
            return f"its classifier has {self.file_classes} classes; use a checkpoint trained on this data"
        return "set `net` to its architecture, or use another checkpoint"


def match_tensors(
    state: Mapping[str, Tensor], net: nn.Module, path: str, name: str, classes: int
) -> tuple[dict[str, Tensor], ImportReport]:
    """Rename the tensors of a foreign state dict to match a network.

    A name that the network has is kept. Otherwise wrapper prefixes are stripped and synonyms of layer names tried.

    Args:
        state: Foreign name -> tensor.
        net: The network to match; it is not changed.
        path: The file, for the report.
        name: The network's architecture, for the report.
        classes: Number of classes, for the report.

    Returns:
        The matching tensors under the names of the network, and the report.

    Raises:
        CheckpointError: Two tensors of the file match the same one of the network.
    """
    target = net.state_dict()
    renamed = _rename(state, target)
    matched = {new: t for new, (_, t) in renamed.items() if new in target and target[new].shape == t.shape}
    mismatched = [new for new in renamed if new in target and new not in matched]
    head = next(key for key, module in net.named_modules() if module is find_classifier(net))
    file_head = renamed.get(f"{head}.weight")
    report = ImportReport(
        path=path,
        net=name,
        classes=classes,
        matched=len(matched),
        renamed=tuple((old, new) for new, (old, _) in renamed.items() if old != new and new in matched),
        missing=tuple(key for key in target if key not in renamed and not key.endswith(_COUNTER)),
        unexpected=tuple(old for new, (old, _) in renamed.items() if new not in target and not new.endswith(_COUNTER)),
        mismatched=tuple((new, tuple(renamed[new][1].shape), tuple(target[new].shape)) for new in mismatched),
        file_classes=None if file_head is None else int(file_head[1].shape[0]),
    )
    if not report.complete:
        report = replace(report, alternatives=_matching_nets(state, report.file_classes or classes))
    return matched, report


def _rename(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Return name in the network (or stripped foreign name) -> (foreign name, tensor)."""
    renamed: dict[str, tuple[str, Tensor]] = {}
    for old, tensor in state.items():
        new = _canonical(old, tensor, target)
        if new in renamed:
            raise CheckpointError(
                f"tensors {renamed[new][0]!r} and {old!r} of the checkpoint both match {new!r}: it holds two networks; "
                "pass `key` to select one, or save one alone"
            )
        renamed[new] = (old, tensor)
    return renamed


def _canonical(name: str, tensor: Tensor, target: Mapping[str, Tensor]) -> str:
    stripped = name
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


def _matching_nets(state: Mapping[str, Tensor], classes: int) -> tuple[str, ...]:
    """Return the networks of NETS that these tensors match exactly."""
    given = {key: tensor for key, tensor in state.items() if not key.endswith(_COUNTER)}
    names = []
    for name in NETS:
        target = build_net(name, max(2, classes)).state_dict()
        weights = {key: tensor.shape for key, tensor in target.items() if not key.endswith(_COUNTER)}
        if len(weights) != len(given):
            continue
        if weights == {_canonical(old, tensor, target): tensor.shape for old, tensor in given.items()}:
            names.append(name)
    return tuple(names)


def _examples(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    rest = f" (+{len(items) - _SHOWN} more)" if len(items) > _SHOWN else ""
    return [f"  {title} ({len(items)}): " + ", ".join(items[:_SHOWN]) + rest]
