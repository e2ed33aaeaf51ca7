"""Signs of the effects that IF-Beta's score removal predicts, with the teacher's own head and at the optimum.

    python bench/if_beta_signs.py --data digits --cache cache [--removed 200]

The truth is the change of the loss on IF-Beta's held-out samples when Newton's method fits the head again without a
sample, to a gradient norm of 1e-8. The table has the share of right signs and Spearman's correlation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

import kdfast
from kdfast.data.holdout import hold_out
from kdfast.data.readers.registry import open_source
from kdfast.pruning.if_beta.scores import HeadInputs, removal
from kdfast.pruning.scores.influence import DEFAULT_L2
from kdfast.teacher.cache import TeacherCache

sys.path.insert(0, str(Path(__file__).parent))

from harness import machine, table, write_results


def measure_effects(inputs: HeadInputs, rows: np.ndarray) -> Tensor:
    """Return the true effects of removing each of the rows."""
    x, y, held = inputs.features.double(), inputs.labels, inputs.held_out
    n, classes = len(y), inputs.logits.shape[1]
    fitted = kdfast.head_newton(x, y, l2=DEFAULT_L2, classes=classes, method="cg")

    def loss(weights: Tensor) -> Tensor:
        return F.cross_entropy(kdfast.head_logits(x[held], weights), y[held])

    effects = []
    for row in rows:
        keep = torch.arange(n) != int(row)
        l2 = DEFAULT_L2 * n / (n - 1)  # keeps the penalty's weight relative to each sample's loss
        without = kdfast.head_newton(x[keep], y[keep], l2=l2, classes=classes, init=fitted, method="cg")
        effects.append(loss(without) - loss(fitted))
    return torch.stack(effects)


def predict_with_own_head(inputs: HeadInputs) -> np.ndarray:
    """Return removal effects (N,) predicted at the teacher's own head."""
    held, x, y, z = torch.from_numpy(inputs.held_out), inputs.features, inputs.labels, inputs.logits
    effects = kdfast.head_influence(x, z, y, x[held], z[held], y[held], l2=DEFAULT_L2)
    return np.asarray(effects.double().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--removed", type=int, default=200)
    options = parser.parse_args()
    source, cache = open_source(options.data), TeacherCache.open(options.cache)
    labels = source.train.labels
    z, x = (torch.tensor(np.asarray(part)) for part in (cache.identity_logits(), cache.features()))
    inputs = HeadInputs(z, x, torch.from_numpy(labels), hold_out(labels, z.shape[1])[1])
    rows = np.random.default_rng(0).choice(len(labels), options.removed, replace=False)
    truth = measure_effects(inputs, rows).numpy()
    results = []
    for name, predicted in (("teacher's own", predict_with_own_head(inputs)), ("optimum", removal(inputs))):
        right = float((np.sign(predicted[rows]) == np.sign(truth)).mean())
        results.append({"head": name, "signs right": right, "Spearman": float(spearmanr(predicted[rows], truth)[0])})
    print(table(results), machine(), sep="\n")
    print(write_results("if_beta_signs", results, fingerprint=source.fingerprint, removed=options.removed))


if __name__ == "__main__":
    main()
