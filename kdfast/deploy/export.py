"""Write a network in a format of other software, and check what was written by running it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdfast
from kdfast.data.views import ViewSpec, apply_views
from kdfast.deploy.formats import FORMATS, NotRunnable, Run
from kdfast.deploy.trained import Trained
from kdfast.errors import OutputError, UsageError, look_up
from kdfast.files import atomic_path, check_replaceable, check_writable
from kdfast.ops.float32 import full_float32

INPUTS = ("pixels", "normalized")

TOLERANCE = 1e-4
"""Largest difference of a logit from that of the network, relative to the largest logit, or to 1 if that is smaller."""

_CHECKED_BATCHES = (1, 3)


@dataclass(frozen=True)
class Exported:
    """An exported network.

    Attributes:
        path: The file.
        format: A name of FORMATS.
        input: What it takes: `pixels`, RGB values divided by 255; or `normalized`, those minus the mean, divided by the
            standard deviation.
        difference: Largest difference of a logit from the network's, relative as in TOLERANCE; None if the file was not
            run.
        reason: Why it was not run, else None.
    """

    path: Path
    format: str
    input: str
    difference: float | None
    reason: str | None


class PixelInput(nn.Module):
    """A network that normalizes its input itself.

    Args:
        trained: The network and its normalization.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        mean, std = trained.model.normalization.mean, trained.model.normalization.std
        self.net = trained.model.net
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, 3, H, W), RGB in 0 to 1."""
        logits: Tensor = self.net((image - self.mean) / self.std)
        return logits


def check_export(out: Path, format: str, input: str | None, *, force: bool) -> str:
    """Check an export before the network is opened, and return what the exported network takes. Writes nothing.

    Args:
        out: The file to write.
        format: A name of FORMATS.
        input: One of INPUTS; None: pixels where the format holds computations, as a file of weights cannot normalize.
        force: Replace a file that kdfast exported.

    Raises:
        UsageError: The format or the input is unknown or impossible, or a package is missing.
        OutputError: The file exists, or cannot be written.
    """
    entry = look_up(FORMATS, format, "format")
    entry.check_package()
    if input is not None and input not in INPUTS:
        raise UsageError(f"`input` is {input!r}: pass one of {', '.join(INPUTS)}")
    if input == "pixels" and not entry.has_graph:
        raise UsageError(
            f"`input` is pixels, but {format} holds weights alone, which cannot normalize their input: omit it, or "
            "export to onnx or torchscript"
        )
    for path in (out, card_path(out)):
        if force:
            check_replaceable(path, is_exported)
        elif path.exists() or path.is_symlink():
            raise OutputError(f"{path} exists: choose another `out`, or replace it with `force`")
    return input or ("pixels" if entry.has_graph else "normalized")


def card_path(out: Path) -> Path:
    """Return the path of the model card of an exported file."""
    return out.with_name(f"{out.name}.md")


def is_exported(path: Path) -> bool:
    """Return whether a file is an exported network or its card: a card beside it, or it itself, names kdfast."""
    card = path if path.suffix == ".md" else card_path(path)
    try:
        return CARD_SIGNATURE in card.read_bytes()
    except OSError:
        return False


CARD_SIGNATURE = b"<!-- model card written by kdfast -->"


def export(trained: Trained, out: Path, format: str, input: str) -> Exported:
    """Write the network to a file, and compare the outputs of that file with the network's.

    The comparison uses random images, in batches of different sizes.

    Args:
        trained: The network.
        out: The file.
        format: A name of FORMATS.
        input: What the exported network takes, see `check_export`.

    Raises:
        OutputError: The file cannot be written, or does not compute what the network computes; nothing is written.
    """
    entry = FORMATS[format]
    check_writable(out.parent)
    network: nn.Module = PixelInput(trained) if input == "pixels" else trained.model.net
    network.eval()
    example = torch.rand(2, 3, *trained.size, generator=torch.Generator().manual_seed(0))
    facts = {name: json.dumps(value) for name, value in describe(trained, input).items()}
    with atomic_path(out) as temporary:
        try:
            with torch.no_grad():
                entry.write(network, example, temporary, facts)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise OutputError(f"{trained.path} cannot be exported to {format}: {_first_line(error)}") from error
        try:
            difference, reason = _check(trained, entry.run(temporary, trained.model), input), None
        except NotRunnable as why:
            difference, reason = None, str(why)
        if difference is not None and not difference <= TOLERANCE:
            raise OutputError(
                f"the exported network differs from the original by {difference:.2g} of the largest logit, more than "
                f"{TOLERANCE:g}: its computation may depend on its input; try another format"
            )
    return Exported(out, format, input, difference, reason)


def describe(trained: Trained, input: str) -> dict[str, Any]:
    """Return what software that runs an exported network must know, as JSON values."""
    model = trained.model
    return {
        "net": model.name,
        "classes": list(model.class_names),
        "input": input,
        "input_size": list(trained.size),
        "mean": list(model.normalization.mean),
        "std": list(model.normalization.std),
        "kdfast": kdfast.__version__,
    }


@torch.no_grad()
@full_float32()
def _check(trained: Trained, run: Run, input: str) -> float:
    """Return the largest relative difference of the logits of a file from those of the network on its own path."""
    spec, largest = ViewSpec(kind="shift", size=trained.size), 0.0
    generator = torch.Generator().manual_seed(0)
    for count in _CHECKED_BATCHES:
        images = torch.randint(0, 256, (count, *trained.size, 3), generator=generator, dtype=torch.uint8)
        views = torch.full((count,), spec.identity)
        normalized = apply_views(images, views, spec, trained.model.normalization)
        given = images.permute(0, 3, 1, 2).float() / 255 if input == "pixels" else normalized
        expected, found = trained.model.net(normalized).double(), run(given.contiguous()).double()
        if found.shape != expected.shape:
            return math.inf
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        # NaN is not larger than anything.
        largest = max(largest, difference) if math.isfinite(difference) else math.inf
    return largest


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
