"""Tensors of a checkpoint that are no layers: counters, losses, and the input normalization of the network."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, UsageError

# thop; torch's AveragedModel; averaged models of other libraries.
_COUNTERS = ("total_ops", "total_params", "n_averaged", "num_updates", "decay", "initted", "step")
_LOSS = re.compile(r"(?:^|_)(?:loss|losses|criterion|criterions|criteria)(?:_|$)")
_LOSS_WEIGHTS = ("class_weight", "class_weights", "pos_weight", "loss_weight", "loss_weights")
_MEANS = ("mu", "mean", "means", "new_mean", "pixel_mean", "image_mean", "img_mean", "norm_mean")
_FULL_SCALE = 255


def drop_ignored(state: Mapping[str, Tensor], patterns: Sequence[str], path: str) -> dict[str, Tensor]:
    """Return the tensors whose names match none of the patterns (* and ? stand for any text and any character).

    Raises:
        UsageError: A pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in state):
            raise UsageError(
                f"`ignore` {pattern!r} matches no tensor of {path}: pass a name of the file, in which * stands for any "
                "text"
            )
    return {name: t for name, t in state.items() if not any(fnmatchcase(name, pattern) for pattern in patterns)}


def find_harmless(state: Mapping[str, Tensor], target: Collection[str]) -> tuple[str, ...]:
    """Return the names of counters and of weights of losses, which take no part in computing the logits."""
    return tuple(name for name, t in state.items() if name not in target and (_is_counter(name, t) or _is_loss(name)))


def _is_counter(name: str, tensor: Tensor) -> bool:
    return name.rpartition(".")[2] in _COUNTERS and tensor.numel() == 1


def _is_loss(name: str) -> bool:
    *modules, last = name.split(".")
    return last in _LOSS_WEIGHTS or any(_LOSS.search(module) for module in modules)


@dataclass(frozen=True)
class StoredNormalization:
    """Mean and standard deviation that a network subtracts and divides by itself.

    Attributes:
        names: Names of the tensors in the file.
        value: The normalization; None if the values do not tell their scale.
        is_identity: Whether it leaves images on the scale 0 to 1 as they are.
    """

    names: tuple[str, ...]
    value: Normalization | None
    is_identity: bool = False

    def describe(self) -> str:
        """Return what the tensors are, for a report."""
        names = ", ".join(self.names)
        if self.value is None:
            return (
                f"{names} look like the normalization of the input, but on a scale that is neither 0 to 1 nor 0 to 255"
            )
        mean, std = (",".join(f"{x:.4g}" for x in values) for values in (self.value.mean, self.value.std))
        return f"normalization of the input ({names}): mean {mean}, std {std}"


def find_normalization(state: Mapping[str, Tensor], names: Iterable[str], path: str) -> StoredNormalization | None:
    """Find the input normalization among tensors that belong to no layer.

    Args:
        state: Name in the file -> tensor.
        names: The names to look at.
        path: The file, for the message.

    Returns:
        The normalization, or None without tensors of such names and sizes.

    Raises:
        CheckpointError: There are several, with different values.
    """
    left = set(names)
    pairs = [pair for name in sorted(left) if (pair := _pair(name, left, state)) is not None]
    if not pairs:
        return None
    found = [(_channels(state[mean]), _channels(state[std])) for mean, std in pairs]
    used = tuple(name for pair in pairs for name in pair)
    if len(set(found)) > 1:
        raise CheckpointError(
            f"{path} holds several normalizations of the input ({', '.join(used)}): leave out all but one with `ignore`"
        )
    mean, std = found[0]
    return StoredNormalization(used, _on_unit_scale(mean, std), mean == (0.0,) * 3 and std == (1.0,) * 3)


def _pair(name: str, left: set[str], state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    module, dot, last = name.rpartition(".")
    if last not in _MEANS:
        return None
    partners = ("sigma", "std") if last == "mu" else (last.replace("mean", "std"),)
    for partner in (f"{module}{dot}{other}" for other in partners):
        if partner in left and all(state[key].numel() in (1, 3) for key in (name, partner)):
            return name, partner
    return None


def _channels(tensor: Tensor) -> tuple[float, float, float]:
    first, second, third = tensor.detach().float().reshape(-1).expand(3).tolist()
    return first, second, third


def _on_unit_scale(mean: tuple[float, float, float], std: tuple[float, float, float]) -> Normalization | None:
    """Return the values on the scale 0 to 1; None if they are on neither that scale nor on 0 to 255."""
    if not (min(mean) >= 0 and min(std) > 0):
        return None
    if max(mean) <= 1 and max(std) <= 1:
        return Normalization(mean, std)
    if 1 < max(mean) <= _FULL_SCALE and 1 < max(std) <= _FULL_SCALE:
        first, second, third = (value / _FULL_SCALE for value in mean)
        return Normalization((first, second, third), (std[0] / _FULL_SCALE, std[1] / _FULL_SCALE, std[2] / _FULL_SCALE))
    return None
