"""Options of a training's recipe beside its loss, for the commands that train a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdfast.cli.output import MODE, complain

if TYPE_CHECKING:
    import torch

    from kdfast.data.loaders import Loader
    from kdfast.data.source import Source, Split
    from kdfast.distillation.config import RunConfig

# Kinds of data that papers augment in one way.
CONVENTIONAL = ("cifar10", "cifar100", "svhn", "digits")

Optimizer = Annotated[
    str,
    typer.Option(
        "--optimizer",
        help="sgd with momentum, nesterov (SGD with Nesterov's momentum), or adamw (beta1 is --momentum, beta2 0.999).",
        metavar="sgd|nesterov|adamw",
    ),
]
LabelSmoothing = Annotated[
    float,
    typer.Option("--label-smoothing", help="Share of each label that is spread evenly over all classes, in [0, 1)."),
]
Ema = Annotated[
    float,
    typer.Option(
        "--ema",
        help="Decay of an exponential moving average of the weights, in [0, 1), which is evaluated and saved as the "
        "network; 0: none.",
    ),
]
Clip = Annotated[
    float,
    typer.Option("--clip", help="Scale gradients down whose norm, over all parameters, is larger; 0: never."),
]
Augment = Annotated[
    str | None,
    typer.Option(
        "--augment",
        help="Augmentation in place of the data's own: none; cifar (pad by 4, crop, mirror); imagenet (random resized "
        "crops, mirrored); or the data's own followed by randaugment (also randaugment:n=2,m=9) or trivial "
        "(TrivialAugment). With a cache, that of the cache.",
        metavar="none|cifar|imagenet|randaugment|trivial",
    ),
]
Mixup = Annotated[
    float,
    typer.Option(
        "--mixup",
        help="Mix each image and label with another of the batch, by a share from Beta(A, A); needs --teacher or none, "
        "not --cache. 0: no mixup.",
        metavar="A",
    ),
]
CutMix = Annotated[
    float,
    typer.Option(
        "--cutmix",
        help="Replace a box of each image by that of another of the batch, with a share from Beta(A, A); with --mixup, "
        "one of them for each batch. 0: no CutMix.",
        metavar="A",
    ),
]


def changed(**settings: Any) -> dict[str, Any]:
    """Return the settings of `RunConfig` that are not its default."""
    import dataclasses

    from kdfast.distillation.config import RunConfig

    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    return {name: value for name, value in settings.items() if value != defaults[name]}


def announce_unused(config: RunConfig, cache: str | None, teacher: str | None) -> None:
    """Say on stderr which options have no effect on a run."""
    if not config.needs_teacher:
        given = {"--cache": cache is not None, "--teacher": teacher is not None}
        announce_no_effect(given, "--alpha is 0 and there is no --kd-term")
    if config.alpha == 0:
        announce_no_effect({"--temperature": config.temperature != type(config).temperature}, "--alpha is 0")
    if config.cross_entropy_weight == 0:
        why = f"the weight of the cross-entropy is 0 (--alpha is {config.alpha:g})"
        announce_no_effect({"--label-smoothing": bool(config.label_smoothing)}, why)
    phase = config.initial_phase
    for term in config.terms:
        if term.entry.initial and not phase:
            announce_no_effect({f"--kd-term {term.name}": True}, "there is no epoch in which it trains alone")
        if term.entry.prepares and not phase and not MODE.quiet:
            complain(f"kdfast: {term.name} is not fitted to the teacher: there is no epoch for it")


def announce_no_effect(given: Mapping[str, bool], why: str) -> None:
    """Say on stderr which flags have no effect: those whose value is true, because the user gave them."""
    for flag, is_given in given.items() if not MODE.quiet else ():
        if is_given:
            complain(f"kdfast: {flag} has no effect: {why}")


def announce_loader(loader: Loader, train: Split, device: torch.device) -> None:
    """Say on stderr that each epoch decodes images, if they do not fit in memory."""
    from kdfast.data.loaders import fits_in_memory

    need = len(train) * math.prod(train.shape)
    if loader.name == "files" and not fits_in_memory(need, device) and not MODE.quiet:
        complain(
            f"kdfast: the decoded images take {need / 1e9:.1f} GB, more than a quarter of the memory, so each epoch "
            "decodes them from their files; --loader resident keeps them in memory"
        )


def announce_views(source: Source, augment: str | None) -> None:
    """Say on stderr how images are augmented, if that is no convention of the data and no choice of the user."""
    from kdfast.data.augment.presets import describe_views

    if augment is None and source.kind not in CONVENTIONAL and not MODE.quiet:
        complain(f"kdfast: images are {describe_views(source.view_spec)} by default; --augment chooses otherwise")
