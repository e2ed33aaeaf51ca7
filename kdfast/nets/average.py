"""Average the weights of several networks, with statistics of batch norms of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdfast.data.order import epoch_order
from kdfast.data.source import Source, Split
from kdfast.data.views import ViewSpec, apply_views, draw_view_indices
from kdfast.errors import CheckpointError, UsageError
from kdfast.nets.checkpoint import Model
from kdfast.nets.fit import check_fit
from kdfast.ops.float32 import full_float32
from kdfast.progress import Progress

METADATA_KEY = "averaged"
_MOST_SAMPLES = 65_536
_BATCH_SIZE = 256


def average_teachers(
    models: Sequence[Model],
    source: Source,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Model:
    """Average the weights of networks that started from the same weights, such as those at the ends of warm restarts.

    The average often classifies better than each of them. Its batch norms see other activations than theirs, so their
    statistics are computed anew: up to 65,536 training samples, drawn at random, pass once in batches of 256, each
    sample as one of its views. Every batch counts alike, and samples after the last whole batch are left out. All other
    layers act as in evaluation. Of a single network, the weights stay and the statistics are computed anew, as an
    exponential moving average needs, too.

    Source:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018.

    Args:
        models: The networks, of one architecture, with equal class names and normalizations; they are not changed.
        source: Their data. The test split is not read.
        seed: Seed of the samples, their order and their views.
        device: Where to compute.
        progress: Called with (batches done, batches, "batch norms").

    Returns:
        A new model on the CPU, whose metadata are "input_size" and "averaged", with the digests of the weights
        ("teachers"), the data's fingerprint ("data"), "seed", and the number of "samples" that passed.

    Raises:
        UsageError: There is no model.
        CheckpointError: The models differ in more than their weights, or do not fit the data.
    """
    if not models:
        raise UsageError("`models` is empty: pass at least one model")
    first = models[0]
    for model in models[1:]:
        _check_alike(model, first)
    net = copy.deepcopy(first.net)
    net.load_state_dict(average_states([model.net.state_dict() for model in models]))
    average = Model(net, first.name, first.classes, first.class_names, first.normalization)
    check_fit(average, source, "the average")
    place = torch.device(device)
    net.to(place)
    samples = compute_statistics(average, source.train, source.view_spec, seed, place, progress)
    net.to("cpu").eval()
    about = {"teachers": [x.digest for x in models], "data": source.fingerprint, "seed": seed, "samples": samples}
    average.metadata = {METADATA_KEY: about, "input_size": list(source.view_spec.size)}
    return average


def average_states(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each floating-point tensor, computed in float64, and the first of each other tensor."""
    first = states[0]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(x.dtype)
        if x.is_floating_point()
        else x
        for name, x in first.items()
    }


@torch.inference_mode()
@full_float32()
def compute_statistics(
    model: Model, split: Split, spec: ViewSpec, seed: int, device: torch.device, progress: Progress | None
) -> int:
    """Replace the statistics of all batch norms by those of a pass; return the number of samples that passed."""
    norms = [x for x in model.net.modules() if isinstance(x, _BatchNorm) and x.track_running_stats]
    if not norms:
        return 0
    order = epoch_order(np.arange(len(split), dtype=np.int64), seed, 0)[:_MOST_SAMPLES]
    batches = max(1, len(order) // _BATCH_SIZE)
    order = order[: batches * _BATCH_SIZE]
    views = draw_view_indices(seed, 0, order, spec.count)
    momenta = [norm.momentum for norm in norms]
    model.net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for i in range(batches):
        part = slice(i * _BATCH_SIZE, (i + 1) * _BATCH_SIZE)
        images = torch.from_numpy(split.read(order[part])).to(device)
        chosen = torch.from_numpy(views[part])
        model.net(apply_views(images, chosen, spec, model.normalization, sample_ids=order[part]))
        if progress is not None:
            progress(i + 1, batches, "batch norms")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return len(order)


def _check_alike(model: Model, first: Model) -> None:
    """Raise unless two models differ in their weights alone.

    Raises:
        CheckpointError: They differ in something else.
    """
    parts = {
        "architecture": (model.name, first.name),
        "classes": (model.class_names, first.class_names),
        "normalization": (model.normalization, first.normalization),
        "tensors": (_shapes(model.net), _shapes(first.net)),
    }
    other = [name for name, (one, two) in parts.items() if one != two]
    if other:
        raise CheckpointError(
            f"the teachers differ in their {' and '.join(other)}: average networks of one architecture that were "
            "trained on the same data"
        )


def _shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in net.state_dict().items()}
