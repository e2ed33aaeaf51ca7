"""Report of the match between a checkpoint and a network: what was found, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kdfast.nets.importing.leftovers import StoredNormalization

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
        removable: Patterns that match the unexpected names and no other.
        left_out: Names in the file that were left out: counters, losses and copies of the network.
        gray: Name in the network of the first convolution, if it has one input channel in the file.
        normalization: The input normalization that the file holds, or None.
        notes: What else the user should know.
    """

    path: str
    net: str
    classes: int
    matched: int
    renamed: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    file_classes: int | None = None
    alternatives: tuple[str, ...] = ()
    removable: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    gray: str | None = None
    normalization: StoredNormalization | None = None
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the file matches the network exactly: nothing missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def with_notes(self, notes: Sequence[str]) -> ImportReport:
        """Return the report with these notes."""
        return replace(self, notes=tuple(notes))

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
        lines += _examples("left out", self.left_out)
        if self.gray is not None:
            lines.append(f"  gray: {self.gray} has one input channel, which becomes the mean of three")
        if self.normalization is not None:
            lines.append(f"  {self.normalization.describe()}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)

    def _remedy(self) -> str:
        other_classes = self.file_classes is not None and self.file_classes != self.classes
        if self.alternatives:
            found = f"it holds {' or '.join(self.alternatives)} with {self.file_classes or self.classes} classes"
            return f"{found}; use one trained on this data" if other_classes else f"{found}; set `net` to that network"
        if other_classes:
            return f"its classifier has {self.file_classes} classes; use a checkpoint trained on this data"
        if not (self.missing or self.mismatched):
            patterns = " ".join(f"`ignore` {pattern!r}" for pattern in self.removable)
            return f"it holds more tensors; if {self.net} computes its logits without them, leave them out: {patterns}"
        if channels := self._channels():
            given, needed = channels
            remedy = f"set `net_arg` channels={given}" if given in (1, 3) else "use a teacher for images of 3 channels"
            return f"its images have {given} channels, those of {self.net} have {needed}; {remedy}"
        return "set `net` to its architecture, or use another checkpoint"

    def _channels(self) -> tuple[int, int] | None:
        """Return the numbers of input channels of the file and of the network, if they are the only difference."""
        if len(self.mismatched) != 1 or self.missing:
            return None
        _, given, needed = self.mismatched[0]
        only_channels = len(given) == len(needed) == 4 and given[0] == needed[0] and given[2:] == needed[2:]
        return (given[1], needed[1]) if only_channels and needed[1] in (1, 3) else None


def _examples(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    rest = f" (+{len(items) - _SHOWN} more)" if len(items) > _SHOWN else ""
    return [f"  {title} ({len(items)}): " + ", ".join(items[:_SHOWN]) + rest]
