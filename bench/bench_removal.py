"""Predicted and true effects of removing training samples, on a teacher's cached features.

    python bench/bench_removal.py --data cifar-10-batches-py --cache cache [--samples 2000] [--removed 200]

Newton's method fits a head to some samples, a share of them with wrong labels. Then it fits the head again without each
of the removed samples in turn, to a gradient norm of 1e-8. The effect is the change of the mean validation loss, on
other samples with true labels. The table has Spearman's correlation of predicted and true effects, and the corrected
prediction's root mean square error divided by that of the first-order (plain) prediction: the mean over seeds and each
seed's value.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

import kdfast
from kdfast.data.readers.registry import open_source
from kdfast.data.readers.relabel import flip_labels
from kdfast.teacher.cache import TeacherCache

sys.path.insert(0, str(Path(__file__).parent))

from harness import machine, table, write_results

SETTINGS = [(l2, share) for l2 in (1e-3, 1e-2) for share in (0.0, 0.05)]
VALIDATION = 1000
TARGETS = "targets: plain >= .98; corrected >= plain, its error <= .85 of plain's"


class FittedHead:
    """A head at its optimum, with predicted and true effects of removals on its validation loss.

    Args:
        x: (N, D) float64 features.
        y: (N,) labels, some wrong.
        val_x: (M, D) float64 features.
        val_y: (M,) labels.
        l2: Weight of the penalty.
    """

    def __init__(self, x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor, l2: float) -> None:
        self.x, self.y, self.val_x, self.val_y, self.l2 = x, y, val_x, val_y, l2
        self.classes = int(torch.cat([y, val_y]).max()) + 1
        self.w = kdfast.head_newton(x, y, l2=l2, classes=self.classes)

    def loss(self, w: Tensor) -> Tensor:
        """Return the mean cross-entropy of the validation samples."""
        return F.cross_entropy(kdfast.head_logits(self.val_x, w), self.val_y)

    def predict_effects(self, corrected: bool, count: int) -> Tensor:
        """Predict the effects (count,) of removing each of the first samples."""
        z, val_z = (kdfast.head_logits(x, self.w) for x in (self.x, self.val_x))
        effects = kdfast.head_influence(
            self.x, z, self.y, self.val_x, val_z, self.val_y, l2=self.l2, corrected=corrected, tol=1e-9
        )
        return effects[:count]

    def retrain_effects(self, count: int) -> Tensor:
        """Measure the effects (count,) by fitting again without each of the first samples."""
        n, effects = len(self.y), []
        for i in range(count):
            keep = torch.arange(n) != i
            l2 = self.l2 * n / (n - 1)  # keeps the penalty's weight relative to each sample's loss
            w = kdfast.head_newton(self.x[keep], self.y[keep], l2=l2, classes=self.classes, init=self.w)
            effects.append(self.loss(w) - self.loss(self.w))
        return torch.stack(effects)


def fit_head(source: Any, cache: TeacherCache, samples: int, share: float, l2: float, seed: int) -> FittedHead:
    """Fit a head to samples drawn by a seed; others of the training split validate it."""
    labels = source.train.labels
    noisy = flip_labels(labels, share, seed, len(source.classes)) if share else labels
    ids = np.random.default_rng(seed).choice(len(labels), samples + VALIDATION, replace=False)
    x = torch.from_numpy(np.array(cache.features()[np.sort(ids)])).double()[np.argsort(np.argsort(ids))]
    y, val_y = torch.from_numpy(noisy[ids[:samples]]), torch.from_numpy(labels[ids[samples:]])
    return FittedHead(x[:samples], y, x[samples:], val_y, l2)


def compare(head: FittedHead, removed: int) -> dict[str, float]:
    """Return both correlations and the ratio of errors for one head."""
    truth = head.retrain_effects(removed)
    predictions = [head.predict_effects(corrected, removed) for corrected in (False, True)]
    errors = [float((predicted - truth).square().mean().sqrt()) for predicted in predictions]
    correlations = [float(spearmanr(predicted, truth).statistic) for predicted in predictions]
    return {"plain": correlations[0], "corrected": correlations[1], "error": errors[1] / errors[0]}


def summarize(l2: float, share: float, comparisons: list[dict[str, float]]) -> dict[str, Any]:
    """Return a row of the table: mean and values over seeds."""
    row: dict[str, Any] = {"l2": l2, "wrong labels": share}
    for name, title in (("plain", "Spearman plain"), ("corrected", "corrected"), ("error", "error / plain's")):
        values = [comparison[name] for comparison in comparisons]
        row[title] = f"{np.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--removed", type=int, default=200)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source, cache = open_source(options.data), TeacherCache.open(options.cache)
    started, rows = time.perf_counter(), []
    for l2, share in SETTINGS:
        heads = (fit_head(source, cache, options.samples, share, l2, seed) for seed in options.seeds)
        rows.append(summarize(l2, share, [compare(head, options.removed) for head in heads]))
        print(f"{table(rows)}\n", flush=True)
    seconds = round(time.perf_counter() - started)
    settings = {"samples": options.samples, "removed": options.removed, "seeds": options.seeds, "seconds": seconds}
    print(TARGETS, machine(), write_results("removal", rows, fingerprint=source.fingerprint, **settings), sep="\n")


if __name__ == "__main__":
    main()
