"""Networks of Hugging Face model folders: the folder's config.json says which; its weights are a separate matter.

Only classes of the installed transformers are used, never code in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from kdfast.errors import CheckpointError, UsageError, did_you_mean
from kdfast.nets.sources.libraries import check_not_loading, first_line, open_library


def build_hugging_face_net(folder: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a newly initialized image classifier of a Hugging Face model folder.

    Args:
        folder: A folder with a config.json.
        classes: Width of the output.
        arguments: Values that replace those of config.json, such as `image_size`.

    Raises:
        LibraryError: transformers is not installed, or does not work.
        UsageError: The folder is none of a classifier of images, or an argument is none of its configuration.
    """
    place = Path(folder).expanduser()
    file = place / "config.json"
    if not file.is_file():
        raise UsageError(f"hf:{folder}: there is no {file}: pass a local folder of a model, downloaded before")
    transformers = open_library("transformers", f"hf:{folder}")
    _check_runs_no_kernels(file)
    try:
        config = transformers.AutoConfig.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the readers of hundreds of configurations
        raise UsageError(f"{file} cannot be used ({first_line(error)}): pass the folder of another model") from error
    _set_values(config, f"hf:{folder}", {**arguments})
    config.num_labels = classes
    try:
        net = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UsageError(
            f"hf:{folder} cannot be built as a classifier of images with {classes} classes ({first_line(error)}): "
            "choose another network"
        ) from error
    return cast(nn.Module, net.float())


def read_hugging_face_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a Hugging Face image classifier under the names of the installed transformers.

    Those in the file may be of another version. Weights that the file lacks are left out.

    Raises:
        LibraryError: transformers is not installed, or does not work.
        CheckpointError: The folder holds no such weights.
        UsageError: Its configuration asks for code from elsewhere.
    """
    transformers = open_library("transformers", f"hf:{folder}")
    _check_runs_no_kernels(folder / "config.json")
    messages = transformers.utils.logging
    level, shows_bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(messages.CRITICAL)
    messages.disable_progress_bar()
    try:
        net, found = transformers.AutoModelForImageClassification.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # the readers of hundreds of networks
        raise CheckpointError(
            f"{folder} cannot be read as an image classifier of Hugging Face ({first_line(error)}): download it again, "
            "or use another"
        ) from error
    finally:
        messages.set_verbosity(level)
        if shows_bars:
            messages.enable_progress_bar()
    return {name: tensor for name, tensor in net.state_dict().items() if name not in found["missing_keys"]}


def _check_runs_no_kernels(file: Path) -> None:
    """Refuse a configuration with an implementation such as "owner/kernels", which transformers downloads and runs."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong
    for key, value in _values(content):
        if key.endswith("_implementation") and "/" in value:
            raise UsageError(
                f"{file} asks for {key} {value!r}, code from elsewhere, which kdfast does not run: delete {key} from it"
            )


def _values(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts in nested dicts and lists, each with the innermost key that names an implementation, or any."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _values(value, key if key.endswith("_implementation") else name)
    elif isinstance(content, list):
        for value in content:
            yield from _values(value, key)
    elif isinstance(content, str):
        yield key, content


def _set_values(config: Any, name: str, arguments: Mapping[str, Any]) -> None:
    check_not_loading(name, arguments)
    # Names with an underscore choose implementations, some of which are downloaded.
    known = [key for key in config.to_dict() if not key.startswith("_") and key != "auto_map"]
    for key, value in arguments.items():
        if key not in known:
            raise UsageError(
                f"`net_arg` {key} is not in the configuration of {name}: {did_you_mean(key, known)}omit it"
            )
        setattr(config, key, value)
