"""The model card of an exported network: what it is, what it was made from, and how to use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kdfast
from kdfast.deploy.export import CARD_SIGNATURE, TOLERANCE, Exported, card_path
from kdfast.deploy.trained import Trained
from kdfast.files import atomic_write
from kdfast.text import printable

_UNKNOWN = "not recorded"
_SHOWN_CLASSES = 1000


def write_card(trained: Trained, exported: Exported) -> None:
    """Write the card beside the exported file, as FILE.md.

    Raises:
        OutputError: It cannot be written.
    """
    with atomic_write(card_path(exported.path)) as file:
        file.write(render_card(trained, exported).encode(errors="backslashreplace"))


def render_card(trained: Trained, exported: Exported) -> str:
    """Return the card, in Markdown."""
    model = trained.model
    parts = [
        "---\nlicense: other  # choose one: it depends on the data and the teacher\nlibrary_name: kdfast\n---",
        CARD_SIGNATURE.decode(),
        f"# {_code(exported.path.name)}",
        f"A network of the architecture {_code(model.name)} that classifies images of {trained.size[1]} x "
        f"{trained.size[0]} pixels into {model.classes} classes, exported as {exported.format}.",
        "## Input and output",
        _table(_interface(trained, exported)),
        "## Training",
        _table(_training(trained)),
        "## Results on the test split",
        _table(_results(trained)),
        "## Cost",
        _table(_cost(trained)),
        "## Classes",
        _classes(model.class_names, trained.result.get("per_class")),
        "## Licence",
        "To be stated by the person who publishes this network.",
    ]
    return "\n\n".join(parts) + "\n"


def _interface(trained: Trained, exported: Exported) -> Iterator[tuple[str, str]]:
    normalization = trained.model.normalization
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (normalization.mean, normalization.std))
    yield "input", f"float32, (batch, 3, {trained.size[0]}, {trained.size[1]}), RGB"
    if exported.input == "pixels":
        yield "values", "pixels divided by 255, in 0 to 1; the network normalizes them itself"
    else:
        yield "values", "(pixels / 255 - mean) / std for each channel: **normalize before you call the network**"
    yield "mean", mean
    yield "std", std
    yield "output", "logits, (batch, classes); softmax makes them probabilities"
    yield (
        "check",
        f"not run: {exported.reason}"
        if exported.difference is None
        else f"outputs of this file differ from the network's by at most {exported.difference:.2g} of the largest "
        f"logit (allowed: {TOLERANCE:g})",
    )


def _training(trained: Trained) -> Iterator[tuple[str, str]]:
    config, inputs, result, metadata = trained.config, trained.inputs, trained.result, trained.model.metadata
    yield "data", _path(inputs.get("data"))
    yield "fingerprint of the data", str(config.get("data") or metadata.get("data") or _UNKNOWN)
    yield "subset", _path(inputs.get("subset"), "the whole training split" if inputs else _UNKNOWN)
    if "kept" in result:
        yield "training samples", str(result["kept"])
    yield "teacher", _teacher(trained)
    length = "epochs" if config.get("steps") is None else "steps"
    for name in ("alpha", "temperature", length, "batch_size", "lr", "schedule", "seed", "precision"):
        if name in config:
            yield name, str(config[name])
    if "imported_from" in metadata:
        yield "imported from", _code(metadata["imported_from"])
    yield "weights", f"SHA-256 {trained.model.digest}"
    yield (
        "software",
        ", ".join(f"{name} {inputs[name]}" for name in ("kdfast", "torch") if name in inputs)
        or (f"exported with kdfast {kdfast.__version__}"),
    )


def _teacher(trained: Trained) -> str:
    targets, teacher = trained.result.get("targets"), trained.config.get("teacher")
    if not trained.result:
        return _UNKNOWN
    if targets is None:
        return "none: trained on the labels"
    name = trained.inputs.get("cache") if targets == "cache" else trained.inputs.get("teacher")
    digest = f", SHA-256 {teacher['digest']}" if isinstance(teacher, dict) and "digest" in teacher else ""
    return f"{_path(name)} ({targets}{digest})"


def _results(trained: Trained) -> Iterator[tuple[str, str]]:
    result = trained.result or trained.model.metadata
    for name, words in (("test_top1", "top-1"), ("test_top5", "top-5")):
        yield words, f"{result[name]:.2f}%" if name in result else _UNKNOWN
    if "test_loss" in result:
        yield "loss", f"{result['test_loss']:.4f} nats"
    if calibration := trained.result.get("calibration"):
        yield "expected calibration error", f"{calibration['ece']:.2f} points ({calibration['bins']} bins)"
    if "agreement" in trained.result:
        yield "agreement with the teacher", f"{trained.result['agreement']:.2f}% of the images"


def _cost(trained: Trained) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{sum(parameter.numel() for parameter in trained.model.net.parameters())}"
    for stage, seconds in trained.result.get("cost_seconds", {}).items():
        if seconds:
            yield stage, f"{seconds:.1f} s"
    if "steps" in trained.result:
        yield "steps", f"{trained.result['steps']} ({trained.result['images']} images)"


def _classes(names: tuple[str, ...], accuracies: list[float | None] | None) -> str:
    values = [""] * len(names) if accuracies is None else [f"{v:.2f}%" if v is not None else "" for v in accuracies]
    rows = [f"| {i} | {_text(n)} | {v} |" for i, (n, v) in enumerate(zip(names, values, strict=True))]
    more = [] if len(rows) <= _SHOWN_CLASSES else [f"| ... | {len(rows) - _SHOWN_CLASSES} more | |"]
    return "\n".join(["| index | name | top-1 |", "|---|---|---|", *rows[:_SHOWN_CLASSES], *more])


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _path(path: Any, missing: str = _UNKNOWN) -> str:
    return _code(str(path)) if path else missing


def _text(text: str) -> str:
    """Return text for a cell of a table."""
    return " ".join(printable(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{_text(text).replace('`', chr(39))}`"
