"""What the score tdds loses when dynamics keep only the k most probable classes.

    kdfast dynamics --data D --net resnet8 --epochs 30 --batch-size 64 --top-k C --out dyn
    python bench/tdds_top_k.py --dynamics dyn [--k 1,5,10,20,50]

D has C classes, so `dyn` holds complete predictions. Each score from the k most probable classes is compared with the
one from all: Spearman's correlation, and the share of the hardest tenth that both select. Prints a table and writes
bench/results/tdds_top_k.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from harness import table, write_results
from scipy.stats import spearmanr

from kdfast.dynamics.reader import Dynamics
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score

SHARE = 0.1


class ShorterPredictions(Dynamics):
    """Dynamics as if they had been recorded with a smaller `top_k`."""

    kept: int

    def top(self, run: int, epoch: int) -> Any:
        """Return the first `kept` classes and their probabilities."""
        ids, p = super().top(run, epoch)
        return ids[:, : self.kept], p[:, : self.kept]


def score(dynamics: ShorterPredictions, kept: int, fidelity: str) -> np.ndarray:
    """Return the score from the `kept` most probable classes, float64 (N,)."""
    dynamics.kept = kept
    inputs = ScoreInputs(dynamics.labels, 0, dynamics=dynamics, options={"fidelity": fidelity})
    return compute_score("tdds", inputs).values


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Return the share of the hardest tenth of one score that is in that of the other."""
    count = round(SHARE * len(first))
    hardest = [np.argsort(-values, kind="stable")[:count] for values in (first, second)]
    return len(np.intersect1d(*hardest)) / count


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dynamics", required=True)
    parser.add_argument("--k", default="1,5,10,20,50")
    arguments = parser.parse_args()
    dynamics = ShorterPredictions.open(arguments.dynamics)
    if dynamics.top_k < dynamics.classes:
        raise SystemExit(f"{arguments.dynamics} has {dynamics.top_k} of {dynamics.classes} classes: record all of them")
    rows = []
    for fidelity in ("paper", "code"):
        complete = score(dynamics, dynamics.classes, fidelity)
        for kept in (int(k) for k in arguments.k.split(",")):
            found = score(dynamics, kept, fidelity)
            rows.append({
                "fidelity": fidelity,
                "k": kept,
                "rank correlation": f"{spearmanr(found, complete)[0]:.3f}",
                "overlap of the hardest tenth": f"{overlap(found, complete):.3f}",
            })  # fmt: skip
    print(table(rows))
    recording = {"classes": dynamics.classes, "samples": dynamics.n, "epochs": dynamics.epochs, **dynamics.facts}
    write_results("tdds_top_k", rows, recording=recording)


if __name__ == "__main__":
    main()
