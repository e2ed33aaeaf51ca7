"""Options that several commands share, and the checks of their values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdfast.cli.config.read import load_defaults
from kdfast.cli.config.write import write_config
from kdfast.cli.output import complain
from kdfast.errors import OutputError, UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

    from kdfast.data.views import Normalization

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# Values of --precision for a cache, and the words of its manifest.
CACHE_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}

_OTHER_WORDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def one_of(flag: str, value: str, allowed: Iterable[str]) -> str:
    """Return a value that is one of several words.

    Raises:
        UsageError: It is not one of them; the message suggests the closest.
    """
    words = list(allowed)
    if value not in words:
        raise UsageError(f"{flag} is {value!r}: {did_you_mean(value, words)}pass one of {', '.join(words)}")
    return value


def parse_precision(value: str) -> str:
    """Return a precision as auto, fp32, bf16 or fp16, given as such or by its torch name.

    Raises:
        UsageError: It is not one of them.
    """
    return one_of("--precision", _OTHER_WORDS.get(value, value), PRECISIONS)


def parse_cache_precision(value: str) -> str:
    """Return a precision of a cache as auto, fp32 or bf16, given as such or by its torch name.

    Raises:
        UsageError: It is not one of them.
    """
    word = _OTHER_WORDS.get(value, value)
    if word == "fp16":
        raise UsageError(
            f"--precision is {value!r}, but a cache is computed in fp32 or bf16: pass one of auto, fp32, bf16"
        )
    return one_of("--precision", word, ("auto", *CACHE_PRECISIONS))


def choose_precision(value: str, device: torch.device) -> str:
    """Return the precision to train with on a device; say on stderr if it is slower there than fp32."""
    from kdfast.device import is_slower_than_float32, resolve_precision

    precision = resolve_precision(value, device)
    if is_slower_than_float32(precision, device):
        complain(f"kdfast: {precision} is slower than fp32 on this CPU; --precision auto chooses the faster one")
    return precision


def allow_code(names: list[str] | None) -> list[str] | None:
    """Let checkpoints of these networks run their code."""
    if names:
        from kdfast.nets.sources.own_code import name_code

        for name in names:
            name_code(name)
    return names


def with_arguments(net: str, words: list[str] | None) -> str:
    """Return the name of a network with the arguments of --net-arg."""
    if not words:
        return net
    from kdfast.nets.sources.spec import add_arguments, parse_arguments

    return add_arguments(net, parse_arguments(words))


# What help shows for an option that is a path, also where the library takes a str.
PATH = "<path>"

# Scores that another program wrote, for several commands.
KEY_HELP = "Key or column of the scores in a file of another program; needed where it holds several arrays"
HIGHER_HELP = "What a high score in a file of another program means, a hard or an easy sample; default: hard"
HIGHER = "hard|easy"

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Source of data: files of CIFAR, SVHN, MNIST or STL-10, an image folder, a list of images, an .npz file, "
        "Parquet, Arrow or webdataset files, FFCV files written by `kdfast data convert`, or the word digits.",
        metavar="PATH",
    ),
]
# Of commands that do not always need it.
OptionalData = Annotated[
    str | None, typer.Option("--data", help="Source of data, as for `kdfast distill`.", metavar="PATH")
]
NETWORK = (
    "Network, such as resnet8; torchvision:NAME; timm:NAME; hf:FOLDER of a Hugging Face model; or your own code, "
    "FILE.py:NAME or PACKAGE.MODULE:NAME, a class or function of the number of classes."
)
Net = Annotated[str, typer.Option("--net", help=NETWORK, metavar="NAME")]
Student = Annotated[str, typer.Option("--student", help=NETWORK, metavar="NAME")]
NetArg = Annotated[
    list[str] | None,
    typer.Option(
        "--net-arg",
        help="Further argument of the network: a number, true, false, none, a list, or else text. Repeatable.",
        metavar="NAME=VALUE",
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        "--init",
        "--pretrained",
        help="Start from the weights of this file: a checkpoint of kdfast or of other code, .safetensors, or the "
        "folder of a Hugging Face model. A classifier of another number of classes starts anew.",
        metavar=PATH,
    ),
]
TeacherNet = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher-net",
        help="Code of your own that a model file may run, as for --student: needed if it holds a network of such code. "
        "Repeatable.",
        metavar="NAME",
        callback=allow_code,
    ),
]
ModelNet = Annotated[
    list[str] | None,
    typer.Option(
        "--net",
        help="Code of your own that the model file may run, as for `kdfast distill --student`: needed if it holds a "
        "network of such code. Repeatable.",
        metavar="NAME",
        callback=allow_code,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Arithmetic of the networks: fp32, or bf16 or fp16 for automatic mixed precision. auto: bf16 where the "
        "device has instructions for it, else fp32.",
        metavar="auto|fp32|bf16|fp16",
        callback=parse_precision,
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        help="Side in pixels: store the images of a folder as SIZE x SIZE squares; needed where they are larger or of "
        "mixed sizes.",
        min=1,
        max=65535,
    ),
]
Order = Annotated[
    str,
    typer.Option(
        "--order",
        help="Order of an image folder's samples in a class that has sub-folders: path (sorted by path), or "
        "imagefolder (that of torchvision's ImageFolder). Pass the same to every command.",
        metavar="path|imagefolder",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="For data without a test split: the share of every class of the training images to take as one, or share "
        "and seed, such as 0.1:7. Pass the same to every command.",
        metavar="SHARE[:SEED]",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0, max=2**63 - 1)]
Device = Annotated[
    str, typer.Option("--device", help="auto (CUDA where there is a device), cpu, cuda or cuda:N.", metavar="DEVICE")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Start over, and replace what kdfast wrote to --out before; other files are never replaced."
    ),
]


def refuse_other(out: Path, same: bool, force: bool) -> None:
    """Refuse to replace a file by another result than the one that it holds.

    Args:
        out: The file.
        same: Whether it holds the result of the same command.
        force: Whether it may be replaced anyway.

    Raises:
        OutputError: It may not.
    """
    if not (same or force):
        raise OutputError(f"{out} exists and holds another result; choose another --out, or replace it with --force")


DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the inputs, print the plan and write nothing.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with one `option: value` per line, or the config.json of a run; options on the command line "
        "override it.",
        is_eager=True,
        callback=load_defaults,
    ),
]
WriteConfig = Annotated[
    Path | None,
    typer.Option(
        "--write-config",
        help="Write a YAML file for --config with every option, its value here or its default, and its help; do "
        "nothing else.",
        is_eager=True,
        callback=write_config,
    ),
]
Loader = Annotated[
    str,
    typer.Option(
        "--loader",
        help="Where images are read from: resident (decoded, in memory), ffcv (FFCV files), files (image files, "
        "decoded by a process per core), or auto: resident if they fit in a quarter of the memory.",
        metavar="auto|ffcv|files|resident",
    ),
]


def parse_normalization(mean: str | None, std: str | None) -> Normalization | None:
    """Return the input statistics of --mean and --std; None without them.

    Raises:
        UsageError: One of them is missing, or is not of three numbers or one.
    """
    from kdfast.data.views import Normalization

    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UsageError("pass --mean and --std together, or neither where the file holds the normalization")
    return Normalization(_triple("--mean", mean), _triple("--std", std))


def _triple(flag: str, text: str) -> tuple[float, float, float]:
    try:
        numbers = [float(part) for part in text.split(",")]
        first, second, third = numbers * 3 if len(numbers) == 1 else numbers
    except ValueError as error:
        raise UsageError(f"{flag} is {text!r}: pass three numbers, a,b,c, or one for all channels") from error
    return first, second, third


def is_typed(context: typer.Context, name: str) -> bool:
    """Return whether an option is on the command line, rather than in a configuration file or absent."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
