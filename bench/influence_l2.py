"""How the ranks of self-influence depend on the penalty `l2` of the head, from a teacher's cache.

    python bench/influence_l2.py --data cifar-10-batches-py --cache cache

Rows give Spearman's correlation with the ranks at the default `l2`, over all samples and averaged over classes, and the
area under the ROC curve of finding labels flipped at random (10%). They go to bench/results/influence_l2.json.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from harness import machine, table, write_results
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import kdfast
from kdfast.data.readers.registry import open_source
from kdfast.pruning.scores.influence import DEFAULT_L2
from kdfast.teacher.cache import TeacherCache

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def main() -> None:
    """Print the table and write bench/results/influence_l2.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", required=True)
    options = parser.parse_args()
    source = open_source(options.data)
    cache = TeacherCache.open(options.cache, source=source)
    features, logits = (torch.from_numpy(np.array(x, np.float32)) for x in (cache.features(), cache.identity_logits()))
    labels = torch.from_numpy(np.array(source.train.labels, np.int64))
    flipped, wrong = flip(labels, len(source.classes))
    scores = {l2: self_influence(features, logits, labels, l2) for l2 in GRID}
    rows = []
    for l2, values in scores.items():
        reference = scores[DEFAULT_L2]
        classes = [labels.numpy() == c for c in range(len(source.classes))]
        rows.append(
            {
                "l2": f"{l2:g}",
                "Spearman": f"{spearmanr(values, reference)[0]:.5f}",
                "within classes": f"{np.mean([spearmanr(values[c], reference[c])[0] for c in classes]):.5f}",
                "AUC, flipped labels": f"{roc_auc_score(wrong, self_influence(features, logits, flipped, l2)):.4f}",
            }
        )
    print(f"{table(rows)}\n{machine()}\n{write_results('influence_l2', rows, samples=len(labels), default=DEFAULT_L2)}")


def self_influence(features: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, l2: float) -> np.ndarray:
    """Return the self-influence of every sample."""
    return kdfast.head_self_influence(features, logits, labels, l2=l2).double().numpy()


def flip(labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return the labels with 10% of them changed to another class, and which ones."""
    generator = np.random.default_rng(0)
    ids = generator.choice(len(labels), len(labels) // 10, replace=False)
    flipped = labels.clone()
    flipped[ids] = (flipped[ids] + torch.from_numpy(generator.integers(1, classes, len(ids)))) % classes
    wrong = np.zeros(len(labels), bool)
    wrong[ids] = True
    return flipped, wrong


if __name__ == "__main__":
    main()
