"""What flattening for fewer steps, at half the cost of a step, or with a cheaper Fisher does to scores and flatness.

    kdfast data flip digits noisy10 --share 0.1 --seed 0
    kdfast teacher train --data noisy10 --net resnet14 --epochs 80 --views 1 --weight-decay 0 ... --out teacher.pt
    python bench/bench_flatten.py --data noisy10 --clean digits --teacher teacher.pt [--held 0.2] [--steps 250 500]

The teacher is flattened on a held-out part with true labels. `passes` are forward and backward passes of its batches.
`loss` is that of the held-out part, `sam` what it rises by after a step of length 0.05 along its gradient, and `noise`
what it rises by with Gaussian noise of 2% of each filter's norm, the mean of three draws. `test` is top-1. The other
columns are ROC AUC of flipped labels outside the held-out part: of the cross-entropy, and of influence-fvm with the
Fisher of all samples and of the held-out part. `rank` is the Spearman correlation of these two. Writes
bench/results/<name>.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_planted import auc
from harness import table, write_results
from torch import Tensor, nn

from kdfast.data.holdout import SplitPart, hold_out
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source
from kdfast.data.views import apply_views, view_table
from kdfast.nets.checkpoint import Model, load_model
from kdfast.ops.grad_norms import fisher_diagonal, grad_norms
from kdfast.pruning.scores.fvm import DEFAULT_DAMPING, damped_metric
from kdfast.teacher.evaluate import evaluate
from kdfast.teacher.flatten.config import FlattenConfig
from kdfast.teacher.flatten.flattener import Flattener

BATCH = 128
STEP, NOISE, DRAWS = 0.05, 0.02, 3


def main() -> None:
    arguments = parse_arguments()
    noisy, clean = open_source(arguments.data), open_source(arguments.clean)
    model = load_model(arguments.teacher)
    ids = hold_out(clean.train.labels, model.classes, share=arguments.held, seed=0)[1]
    rows = [{"sharpness": "(teacher)", "clip": "", "steps": 0, "passes": 0, **measure(model, noisy, clean, ids)}]
    for sharpness, clip in itertools.product(arguments.sharpness, arguments.clip):
        config = FlattenConfig(sharpness, iterations=max(arguments.steps), clip=clip, held=arguments.held)
        flat = Model(copy.deepcopy(model.net), model.name, model.classes, model.class_names, model.normalization)
        flattener = Flattener(flat, SplitPart(clean.train, ids), ids, clean.view_spec, config)
        for steps in sorted(arguments.steps):
            while flattener.step < steps:
                flattener.take_step()
            passes = steps * (2 if sharpness == "fsam" else 1)
            found = measure(flat, noisy, clean, ids)
            rows.append({"sharpness": sharpness, "clip": clip, "steps": steps, "passes": passes, **found})
            print(table(rows[-1:]), flush=True)
    print(table(rows))
    print(f"\nwritten to {write_results(arguments.name, rows, held=arguments.held)}")


def measure(model: Model, noisy: Source, clean: Source, ids: np.ndarray) -> dict[str, str]:
    """Return the columns of a network, which stays as it is."""
    net = copy.deepcopy(model.net).eval().requires_grad_(True)
    everything = np.arange(len(noisy.train))
    judged = np.setdiff1d(everything, ids)
    planted = (noisy.train.labels != clean.train.labels)[judged]
    images, labels = batch(noisy, everything, model)
    with torch.no_grad():
        losses = [
            F.cross_entropy(net(x), y, reduction="none")
            for x, y in zip(images.split(512), labels.split(512), strict=True)
        ]
    scores = [score(net, images, labels, torch.from_numpy(fitted)).numpy() for fitted in (everything, ids)]
    ranks = [np.argsort(np.argsort(values)) for values in scores]
    columns = {
        **sharpness_of(net, *batch(clean, ids, model)),
        "CE": auc(torch.cat(losses).numpy()[judged], planted),
        "fisher=train": auc(scores[0][judged], planted),
        "fisher=validation": auc(scores[1][judged], planted),
        "rank": float(np.corrcoef(ranks)[0, 1]),
    }
    top1 = evaluate(model, clean.test, device="cpu", view_spec=clean.view_spec)["top1"]
    return {"test": f"{top1:.1f}", **{name: f"{value:.4f}" for name, value in columns.items()}}


def batch(source: Source, ids: np.ndarray, model: Model) -> tuple[Tensor, Tensor]:
    """Return the unaugmented images of training samples, as the network sees them, and their labels."""
    views = torch.from_numpy(view_table(source.view_spec, 0, ids, 1)[:, 0])
    images = torch.from_numpy(source.train.read(ids))
    inputs = apply_views(images, views, source.view_spec, model.normalization, sample_ids=ids)
    return inputs, torch.from_numpy(source.train.labels[ids])


def score(net: nn.Module, images: Tensor, labels: Tensor, fitted: Tensor) -> Tensor:
    """Return influence-fvm of all samples with the Fisher of some, before the square."""

    def batches(x: Tensor, y: Tensor) -> Any:
        return zip(x.split(BATCH), y.split(BATCH), strict=True)

    squares = fisher_diagonal(net, batches(images[fitted], labels[fitted]))
    metric = damped_metric(squares, len(fitted), DEFAULT_DAMPING)
    return torch.cat([torch.as_tensor(grad_norms(net, x, y, metric=metric)) for x, y in batches(images, labels)])


def sharpness_of(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the loss, and what it rises by along the gradient and with noise."""
    weights = list(net.parameters())
    loss = F.cross_entropy(net(images), labels)
    gradient = torch.autograd.grad(loss, weights)
    length = torch.nn.utils.get_total_norm(gradient)
    kept = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def rise(offsets: list[Tensor]) -> float:
        for weight, value, offset in zip(weights, kept, offsets, strict=True):
            weight.copy_(value + offset)
        risen = float(F.cross_entropy(net(images), labels) - loss)
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
        return risen

    noises = []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        noises.append(rise([NOISE * norms(w) * torch.randn(w.shape, generator=generator) for w in kept]))
    return {"loss": float(loss), "sam": rise([STEP / length * g for g in gradient]), "noise": float(np.mean(noises))}


def norms(weight: Tensor) -> Tensor:
    """Return the norm of each filter, a row along the first dimension; of a vector, its norm."""
    rest = tuple(range(1, weight.dim())) or None
    return torch.linalg.vector_norm(weight, dim=rest, keepdim=rest is not None)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="written by `kdfast data flip`")
    parser.add_argument("--clean", required=True, help="the same data with true labels")
    parser.add_argument("--teacher", required=True, help="trained on the flipped labels")
    parser.add_argument("--held", type=float, default=0.2, help="share to hold out (default: 0.2)")
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 500])
    parser.add_argument("--sharpness", nargs="+", default=["fsam", "lpf"])
    parser.add_argument("--clip", type=float, nargs="+", default=[1.0], help="largest gradients (default: 1)")
    parser.add_argument("--name", default="flatten", help="name of the result file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
