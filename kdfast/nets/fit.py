"""Check before any work that a network fits the data: its classes, their names, and images of the data's size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.data.source import Source
from kdfast.errors import CheckpointError, DataWarning, KdfastError, UsageError
from kdfast.nets.checkpoint import Model
from kdfast.nets.head import reorder_classifier
from kdfast.nets.outputs import input_channels

_BATCH = 2  # the smallest batch with a variance
_SHOWN = 4
_ROUNDING = 1e-3  # of the sum of probabilities
_OTHER_SIZE = (
    "choose a network that takes images of this size, pass it the size with `net_arg` if it has such an argument, or "
    "resize the images of a folder with `size`"
)
_RESHAPE = "write reshape or flatten where its code has view, since networks run in channels_last memory"


def check_fit(model: Model, source: Source, name: str) -> None:
    """Check that a model serves a data source: number, names and order of the classes, and the size of the images.

    Names that are only numbers in order, 0, 1, ..., are no names: they agree with all others of the same number. Where
    the names are those of the data in another order, the model's outputs are brought into the data's order, with a
    `DataWarning`. One small batch runs through the network.

    Args:
        model: The model; its classifier changes if its classes have another order.
        source: The data.
        name: The model's file, for messages.

    Raises:
        CheckpointError: It does not.
    """
    if model.classes != len(source.classes):
        raise CheckpointError(
            f"{name} has {model.classes} classes, but {source.path} has {len(source.classes)} classes: use a network "
            "trained on this data"
        )
    _bring_into_order(model, source, name)
    check_class_names(model, source, name)
    try:
        check_channels(model.net, model.name, source)
        check_logits(model.net, model.name, model.classes, source.view_spec.size)
    except UsageError as error:
        raise CheckpointError(f"{name} does not fit {source.path}: {error}") from error


def check_channels(net: nn.Module, name: str, source: Source) -> None:
    """Check that a network for images of one channel gets gray images, of which it takes the mean of three channels.

    Raises:
        UsageError: It would get images in color.
    """
    if input_channels(net) == 1 and not source.gray:
        raise UsageError(
            f"{name} takes images of one channel, and those of {source.path} are in color: choose a network of three "
            "channels"
        )


def check_class_names(model: Model, source: Source, name: str | None = None) -> None:
    """Check that a model of as many classes as the data has the same classes in the same order.

    Args:
        model: The model.
        source: The data.
        name: The model's file, for the message; None if it has none.

    Raises:
        CheckpointError: It has not; the message names the classes and the command that brings them in order.
    """
    theirs, ours = model.class_names, source.classes
    same = sorted(theirs) == sorted(ours)
    if theirs == ours or (not same and (_are_numbers(theirs) or _are_numbers(ours))):
        return
    changed = [(i, a, b) for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b]
    listed = "; ".join(f"class {i} is {a!r} in the network and {b!r} in the data" for i, a, b in changed[:_SHOWN])
    rest = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    command = f"kdfast teacher import {name or 'T.pt'} --net {model.name} --data {source.path} --out NEW.pt"
    if same:
        what = "has the data's classes in another order"
        advice = f"bring its outputs into the data's order by name: {command}"
    else:
        what = "has other class names than the data"
        advice = (
            "use a network trained on this data; or, if these are the same classes in the same order under other "
            f"names, rename them: {command}"
        )
    raise CheckpointError(f"{name or model.name} {what}: {listed}{rest}. To go on, {advice}")


def _bring_into_order(model: Model, source: Source, name: str) -> None:
    """Reorder the outputs of a model whose classes have the names of the data's, if these tell the classes apart."""
    theirs, ours = model.class_names, source.classes
    if theirs == ours or sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        return
    # Numbers may be names or positions.
    if _are_numbers(theirs) or _are_numbers(ours):
        return
    order = [theirs.index(label) for label in ours]
    reorder_classifier(model.net, model.name, order)
    model.class_names = ours
    shown = ", ".join(ours[:_SHOWN]) + ", ..." * (len(ours) > _SHOWN)
    warnings.warn(
        f"{name} has the data's classes in another order: its outputs are reordered by name ({shown})",
        DataWarning,
        stacklevel=3,
    )


def check_training(
    net: nn.Module,
    name: str,
    classes: int,
    size: Sequence[int],
    *,
    batch: int = _BATCH,
    device: torch.device | None = None,
) -> None:
    """Run one forward and backward pass in training mode, and one forward pass in evaluation mode, on random images.

    As in training, network and images have channels_last memory. The generator of random numbers is left as it is. The
    network moves to the device, and gets gradients.

    Args:
        net: The network.
        name: Its name, for messages.
        classes: Width of the logits.
        size: Height and width of the images.
        batch: Images of a batch.
        device: Where to run; None for the CPU.

    Raises:
        UsageError: The network cannot run on such images, does not return logits (B, classes), or has nothing to train.
    """
    place = torch.device("cpu") if device is None else device
    with _checking(name, size, place) as images:
        net.to(device=place, memory_format=torch.channels_last)  # type: ignore[call-overload]
        logits = _as_logits(net.train()(images[:batch]), name, batch, classes)
        if not logits.requires_grad:
            raise UsageError(f"the logits of {name} depend on no trainable parameter: choose another network")
        F.cross_entropy(logits.float(), torch.zeros(batch, dtype=torch.int64, device=place)).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            _as_logits(net.eval()(images), name, _BATCH, classes)


def check_logits(net: nn.Module, name: str, classes: int, size: Sequence[int]) -> None:
    """Run a small batch of random images through a network in evaluation mode, where the network is.

    Raises:
        UsageError: The network cannot run on such images, or does not return logits (B, classes).
    """
    place = next((p.device for p in net.parameters()), torch.device("cpu"))
    training = net.training
    try:
        with _checking(name, size, place) as images, torch.no_grad():
            _as_logits(net.eval()(images), name, _BATCH, classes)
    finally:
        net.train(training)


def draws_random_numbers(net: nn.Module, name: str, size: Sequence[int]) -> bool:
    """Return whether a forward pass in training mode draws from torch's global generator, as dropout does.

    Args:
        net: The network, on the CPU; its batch norms count the pass.
        name: Its name, for messages.
        size: Height and width of the images.

    Raises:
        UsageError: The network cannot run on such images.
    """
    with _checking(name, size, torch.device("cpu")) as images, torch.no_grad():
        before = torch.get_rng_state()
        net.train()(images)
        return not torch.equal(before, torch.get_rng_state())


@contextmanager
def _checking(name: str, size: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield random images (2, 3, height, width); turn every failure into an error that names the network and size."""
    height, width = (int(side) for side in size)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            images = torch.randn(_BATCH, 3, height, width, device=device)
            yield images.contiguous(memory_format=torch.channels_last)
        except (KdfastError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:  # any code may run inside a network
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            remedy = _RESHAPE if "view size is not compatible" in reason else _OTHER_SIZE
            raise UsageError(f"{name} cannot run on images of {width}x{height} ({reason}): {remedy}") from error


def _as_logits(output: Any, name: str, batch: int, classes: int) -> Tensor:
    if isinstance(output, Tensor) and output.shape == (batch, classes) and output.is_floating_point():
        if bool((output >= 0).all()) and bool(((output.float().sum(1) - 1).abs() <= _ROUNDING).all()):
            raise UsageError(f"{name} returns probabilities, not logits: let it return the inputs of its softmax")
        return output
    if isinstance(output, Tensor):
        found = f"a tensor of shape {tuple(output.shape)} and dtype {output.dtype}"
    else:
        fields = getattr(output, "_fields", None) or (list(output) if isinstance(output, dict) else None)
        found = f"a {type(output).__name__}" + (f" of {', '.join(map(str, fields))}" if fields else "")
    raise UsageError(
        f"{name} returns {found}, not logits of shape ({batch}, {classes}) for {batch} images: choose a classifier "
        "that returns its logits, alone or under the name logits, in training and in evaluation mode"
    )


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(index) for index in range(len(names))]
