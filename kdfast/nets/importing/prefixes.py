"""Find the wrapper around a network's tensor names, and the networks of a file that holds several under prefixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kdfast.errors import CheckpointError

_SHARE = 0.5  # of the network's names: fewer are names that networks have in common by chance


def select_prefix(state: Mapping[str, Tensor], prefix: str, path: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it.

    Raises:
        CheckpointError: There are none; the message lists the first parts of the names.
    """
    start = f"{prefix.rstrip('.')}."
    found = {name[len(start) :]: tensor for name, tensor in state.items() if name.startswith(start)}
    if not found:
        heads = Counter(name.partition(".")[0] for name in state)
        listed = ", ".join(f"{head!r} ({count} tensors)" for head, count in heads.most_common(8))
        raise CheckpointError(f"{path} has no tensor under `prefix` {prefix!r}: its names start with {listed}")
    return found


def find_wrapper(state: Mapping[str, Tensor], target: Collection[str], path: str) -> tuple[str, tuple[str, ...]]:
    """Find the prefix under which a file has a network's tensors.

    Args:
        state: Name in the file -> tensor.
        target: Names of the network.
        path: The file, for the message.

    Returns:
        The prefix, empty without one, and the names that hold the same network once more.

    Raises:
        CheckpointError: The file holds several networks under prefixes, with different weights.
    """
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for start in range(len(parts)):
            if (suffix := ".".join(parts[start:])) in target:
                counts[name[: len(name) - len(suffix)]] += 1
    wrappers = [prefix for prefix, count in counts.items() if count >= _SHARE * len(target)]
    if not wrappers:
        return "", ()
    first, *rest = wrappers
    for prefix in rest:
        if not _same(state, first, prefix):
            raise CheckpointError(_several(state, wrappers, path))
    return first, tuple(name for name in state for prefix in rest if prefix and name.startswith(prefix))


def _same(state: Mapping[str, Tensor], first: str, second: str) -> bool:
    """Return whether all tensors under the second prefix equal those under the first."""
    copies = {name[len(second) :]: tensor for name, tensor in state.items() if second and name.startswith(second)}
    return bool(copies) and all(
        (original := state.get(first + name)) is not None and torch.equal(original, tensor)
        for name, tensor in copies.items()
    )


def _several(state: Mapping[str, Tensor], wrappers: list[str], path: str) -> str:
    counts = {p: sum(name.startswith(p) for name in state) for p in wrappers if p}
    listed = " and ".join(f"{prefix.rstrip('.')!r} ({count} tensors)" for prefix, count in counts.items())
    bare = " and without a prefix" if "" in wrappers else ""
    return (
        f"{path} holds several networks in one set of weights, under {listed}{bare}: choose one with `prefix`, for "
        f"example `prefix` {max(wrappers).rstrip('.')}"
    )
