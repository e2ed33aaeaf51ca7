"""Find the weights in a checkpoint: a .safetensors file, or a dict with the weights under some key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kdfast.errors import CheckpointError
from kdfast.nets.foreign import describe_damage, existing_file, read_torch_file
from kdfast.nets.sources.hugging_face import read_hugging_face_weights
from kdfast.nets.sources.spec import parse_spec

# Keys that hold the weights where several places have tensors, in order of preference.
_WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
_DEPTH = 3
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # of Hugging Face


@dataclass(frozen=True)
class FoundWeights:
    """The weights of a file.

    Attributes:
        tensors: Name -> tensor.
        place: Key of the weights in the file, "a.b" for nested dicts; empty if the file holds the weights alone.
        others: Other places of the file that hold weights, with their number of tensors.
    """

    tensors: dict[str, Tensor]
    place: str = ""
    others: tuple[str, ...] = ()


def weights_file(path: str | os.PathLike[str]) -> Path:
    """Return the file with the weights: the path itself, or that of a Hugging Face model if it is a folder.

    Raises:
        CheckpointError: The folder has none.
    """
    place = Path(path)
    if not place.is_dir():
        return place
    for name in _FOLDER_FILES:
        if (place / name).is_file():
            return place / name
    files = " or ".join(_FOLDER_FILES)
    raise CheckpointError(f"no checkpoint at {place}: the folder has no {files}; pass the path of an existing file")


def read_content(path: str | os.PathLike[str], net: str) -> Any:
    """Read a .safetensors file, a file of torch.save, or the weights of a Hugging Face model.

    Args:
        path: The file, or the folder of a Hugging Face model.
        net: The network that the weights are for.

    Raises:
        CheckpointError: As for `read_torch_file`, or the folder holds no weights.
    """
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    its_own = place.is_dir() or place.name in _FOLDER_FILES
    if its_own and parse_spec(net).kind == "hf" and (folder / "config.json").is_file():
        weights_file(folder)
        return read_hugging_face_weights(folder)
    file = weights_file(place)
    return _read_safetensors(file) if file.suffix == ".safetensors" else read_torch_file(file)


def find_weights(content: Any, path: str | os.PathLike[str], key: str | None = None) -> FoundWeights:
    """Find the named tensors in what a file holds.

    Args:
        content: The weights, or a dict with the weights anywhere in it.
        path: The file, for messages.
        key: Key of the weights in the dict, "a.b" for nested dicts; what is left of it after the last dict is the
            start of the names of the tensors. None searches under common names.

    Raises:
        CheckpointError: No weights are found, or several sets without `key`.
    """
    if key is not None:
        content = _descend(path, content, key)
    places = _find_places(content)
    if not places:
        advice = "pass `key` to locate them" if isinstance(content, Mapping) and content else "use another file"
        raise CheckpointError(f"no weights found in {path}: it holds {_describe(content)}; {advice}")
    chosen = _choose(places)
    if chosen is None:
        found = _list_places(places)
        raise CheckpointError(
            f"{path} holds several sets of weights: {', '.join(found)}; choose one with `key`, for example `key` "
            f"{key + '.' if key else ''}{next(iter(places))}"
        )
    others = {place: tensors for place, tensors in places.items() if place != chosen}
    return FoundWeights(places[chosen], chosen, tuple(_list_places(others)))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    import safetensors.torch  # optional format, imported on use

    existing_file(file)
    try:
        return dict(safetensors.torch.load_file(file))
    except Exception as error:  # the compiled reader has its own exception types
        raise CheckpointError(describe_damage(file, error)) from error


def _descend(path: str | os.PathLike[str], content: Any, key: str) -> Any:
    """Return what is under a key; parts of the key that no dict has are a prefix of names."""
    rest = key
    while rest:
        if not isinstance(content, Mapping):
            raise _nothing_under(path, key, content)
        parts = rest.split(".")
        part = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in content), None)
        if part is None:
            start = f"{rest.rstrip('.')}."
            named = {name[len(start) :]: t for name, t in content.items() if str(name).startswith(start)}
            if not named:
                raise _nothing_under(path, key, content)
            return named
        content, rest = content[part], rest[len(part) + 1 :]
    return content


def _nothing_under(path: str | os.PathLike[str], key: str, content: Any) -> CheckpointError:
    return CheckpointError(f"{path} has nothing under `key` {key!r}: it holds {_describe(content)}")


def _find_places(content: Any, depth: int = _DEPTH) -> dict[str, dict[str, Tensor]]:
    """Return place -> tensors for every mapping of names to tensors; empty place: the content itself."""
    if not isinstance(content, Mapping) or depth == 0:
        return {}
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if any(t.ndim > 1 for t in tensors.values()) and (len(tensors) == len(content) or _weights_in(tensors) > 1):
        return {"": tensors}
    places = {
        f"{key}.{place}".rstrip("."): found
        for key, value in content.items()
        if isinstance(key, str)
        for place, found in _find_places(value, depth - 1).items()
    }
    # Tensors of metrics and callbacks count only where nothing looks like layers.
    layers = {place: found for place, found in places.items() if _weights_in(found)}
    return layers or places


def _weights_in(tensors: Mapping[str, Tensor]) -> int:
    return sum(name.endswith(".weight") or name == "weight" for name in tensors)


def _choose(places: Mapping[str, Any], start: str = "") -> str | None:
    """Return the only place, or the one under common keys; None if that leaves several."""
    inside = [place for place in places if place.startswith(start)]
    if len(inside) == 1:
        return inside[0]
    heads = list(dict.fromkeys(place[len(start) :].split(".")[0] for place in inside))
    head = heads[0] if len(heads) == 1 else next((key for key in _WEIGHT_KEYS if key in heads), None)
    return None if head is None else _choose_under(places, f"{start}{head}")


def _choose_under(places: Mapping[str, Any], place: str) -> str | None:
    return place if place in places else _choose(places, f"{place}.")


def _list_places(places: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    return [f"{place!r} ({len(tensors)} tensors)" for place, tensors in places.items()]


def _describe(content: Any) -> str:
    if isinstance(content, Mapping) and content:
        rest = f" and {len(content) - 12} more" if len(content) > 12 else ""
        return "a dict with the keys " + ", ".join(repr(key) for key in list(content)[:12]) + rest
    return f"{'an empty' if isinstance(content, Mapping) else 'a'} {type(content).__name__}"
