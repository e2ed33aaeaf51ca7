"""Flatten a teacher: fine-tune a copy of it on the held-out part, and record how in its metadata."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.data.holdout import SplitPart, hold_out
from kdfast.data.loaders import fits_in_memory
from kdfast.data.source import ArraySplit, Source, Split
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DivergedError, Interrupted, UsageError
from kdfast.files.interrupt import StopRequest
from kdfast.nets.checkpoint import Model
from kdfast.progress import Progress
from kdfast.teacher.evaluate import evaluate
from kdfast.teacher.flatten.checkpoint import FlattenCheckpoint
from kdfast.teacher.flatten.config import FlattenConfig
from kdfast.teacher.flatten.flattener import Flattener

METADATA_KEY = "flattened"
# Results of the teacher as it was, which do not hold for other weights.
_OUTDATED = ("test_top1", "test_top5")
_REPORT_STEPS = 10


def flatten_teacher(
    model: Model,
    source: Source,
    config: FlattenConfig | None = None,
    *,
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    checkpoint_seconds: float = 30.0,
) -> Model:
    """Fine-tune all weights of a teacher towards a flat minimum of the cross-entropy on held-out training samples.

    Sharpness-aware SGD on views of the held-out part, `hold_out` with the share and seed of the settings, in float32.
    The network runs in evaluation mode, so that the statistics of batch norms stay as they are. At such weights,
    gradients of training samples no longer vanish, and influence needs a second-order form. Source: Ye et al., Towards
    Robust Influence Functions with Flat Validation Minima, ICML 2025.

    Args:
        model: The teacher; it is not changed.
        source: Its data. The test split is not read.
        config: The settings; None: the defaults.
        state: File of the state; a call with the same arguments resumes from it to the same bits. It remains after the
            last step, so that nothing is lost before the result is saved; delete it then.
        progress: Called with (steps done, steps, note) every ten steps and after each write of the state.
        device: Where to compute.
        checkpoint_seconds: Seconds between two writes of the state.

    Returns:
        A new model on the CPU. Its metadata are the teacher's, without the accuracies on the test split, and
        "flattened": all of `describe_flattening`; "before" and "after", top-1 in percent and mean loss on the
        unaugmented held-out part; "seconds" of all steps; "images", how many went forward and backward.

    Raises:
        UsageError: The data have fewer views.
        DataError: No class has two samples, or a label is not one of the teacher's classes.
        OutputError: The state cannot be written, belongs to other settings, or is no state.
        DivergedError: A loss or weight is not finite; the state holds the last step that was saved. Or the last loss
            is not below that of the same probabilities for all images, nor below that of the teacher.
        Interrupted: After SIGTERM or Ctrl-C, with the state saved; without `state`, both act as usual.
    """
    config = config or FlattenConfig()
    settings = describe_flattening(model, source, config)
    ids = _held_out_ids(model, source, config)
    place = torch.device(device)
    part = _in_memory(SplitPart(source.train, ids), source)
    net = copy.deepcopy(model.net).to(device=place, memory_format=torch.channels_last)  # type: ignore[call-overload]
    flat = Model(net, model.name, model.classes, model.class_names, model.normalization)
    before = evaluate(flat, part, device=place, view_spec=source.view_spec)
    flattener = Flattener(flat, part, ids, source.view_spec, config)
    checkpoint = FlattenCheckpoint(None if state is None else Path(state), settings)
    checkpoint.load(flattener)
    _run(flattener, config.iterations, checkpoint, checkpoint_seconds, progress)
    after = evaluate(flat, part, device=place, view_spec=source.view_spec)
    if after["loss"] >= max(before["loss"], _entropy(part.labels)):
        checkpoint.delete()
        raise DivergedError(
            f"the loss of the held-out samples is {after['loss']:.3f} after {config.iterations} steps, and was "
            f"{before['loss']:.3f} before: probabilities that ignore the image have less. Lower `lr`, `rho` or `clip`"
        )
    flat.net.to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    scores = {name: {"loss": x["loss"], "top1": x["top1"]} for name, x in (("before", before), ("after", after))}
    results = {**scores, "seconds": flattener.seconds, "images": flattener.images()}
    kept = {name: value for name, value in model.metadata.items() if name not in _OUTDATED}
    flat.metadata = copy.deepcopy(kept) | {METADATA_KEY: settings | results}
    return flat


def describe_flattening(model: Model, source: Source, config: FlattenConfig) -> dict[str, Any]:
    """Return everything that determines the flattened weights, as JSON values.

    Args:
        model: The teacher.
        source: Its data.
        config: The settings.

    Returns:
        The settings; "teacher", the digest of its weights; "data", the fingerprint; "normalization" and "view_spec";
        "held_out", the number of held-out samples.

    Raises:
        UsageError: The data have fewer views.
        DataError: As in `hold_out`.
    """
    spec = source.view_spec
    if config.views > spec.count:
        raise UsageError(f"`views` is {config.views}, but the data has {spec.count}: pass 0 for all, or 1 to that many")
    norm = model.normalization
    settings = {
        **config.to_dict(),
        "teacher": model.digest,
        "data": source.fingerprint,
        "normalization": {"mean": norm.mean, "std": norm.std},
        "view_spec": spec.to_dict(),
        "held_out": len(_held_out_ids(model, source, config)),
    }
    return dict(json.loads(json.dumps(settings)))


def is_flattened_from(model: Model, settings: Mapping[str, Any]) -> bool:
    """Return whether a model is the result of a flattening with these settings, as `describe_flattening` returns."""
    found = model.metadata.get(METADATA_KEY)
    return isinstance(found, dict) and all(name in found and found[name] == settings[name] for name in settings)


def _held_out_ids(model: Model, source: Source, config: FlattenConfig) -> IntArray:
    return hold_out(source.train.labels, model.classes, share=config.held, seed=config.seed)[1]


def _entropy(labels: IntArray) -> float:
    """Return the cross-entropy of the labels with their own frequencies, in nats."""
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return -float(shares @ np.log(shares))


def _in_memory(part: SplitPart, source: Source) -> Split:
    """Return the part decoded, unless the split is in memory already or the part does not fit."""
    size = len(part) * int(np.prod(part.shape))
    if isinstance(source.train, ArraySplit) or not fits_in_memory(size, torch.device("cpu")):
        return part
    return ArraySplit(part.read(np.arange(len(part))), part.labels, source.path)


def _run(
    flattener: Flattener,
    steps: int,
    checkpoint: FlattenCheckpoint,
    checkpoint_seconds: float,
    progress: Progress | None,
) -> None:
    """Take all remaining steps, and save the state from time to time, at a signal and at the end."""
    with StopRequest() if checkpoint.path is not None else contextlib.nullcontext() as stop:
        _take_steps(flattener, steps, checkpoint, checkpoint_seconds, progress, stop)


def _take_steps(
    flattener: Flattener,
    steps: int,
    checkpoint: FlattenCheckpoint,
    checkpoint_seconds: float,
    progress: Progress | None,
    stop: StopRequest | None,
) -> None:
    saved_at = clock = time.monotonic()
    while flattener.step < steps:
        flattener.take_step()
        must_stop = stop is not None and stop.signal_name is not None
        must_save = must_stop or flattener.step == steps or time.monotonic() - saved_at >= checkpoint_seconds
        if not (must_save or flattener.step % _REPORT_STEPS == 0):
            continue
        loss = flattener.take_loss()
        now = time.monotonic()
        flattener.seconds += now - clock
        if must_save:
            checkpoint.save(flattener)
            saved_at = time.monotonic()
        if stop is not None and must_stop:
            raise Interrupted(
                f"stopped by {stop.signal_name} after step {flattener.step} of {steps}: run the same command again to "
                "resume"
            )
        if progress is not None:
            progress(flattener.step, steps, f"loss {loss:.4f}")
        clock = time.monotonic()
