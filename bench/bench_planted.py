"""A planted set: how well each score finds training labels that were flipped on purpose.

    kdfast data flip cifar-10-batches-py noisy10 --share 0.1 --seed 0
    kdfast dynamics --data noisy10 --net resnet8 --epochs 15 --features-every 5 ... --out dyn
    python bench/bench_planted.py --data noisy10 --dynamics dyn --cache c10 [--memorization mem]

The cache is that of a teacher trained on the true labels, its logits and features held against the flipped ones. AUC:
the probability that a flipped label's score is higher than a true one's; lower for the influence of removal, which is
negative for harmful samples. Top: the share of flipped labels among as many samples of the highest (lowest) scores.
Seconds are those of the score from opened inputs. Prints a table, writes bench/results/planted.json.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from harness import table, write_results

from kdfast.data.readers.registry import open_source
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import KdfastError
from kdfast.files import read_json
from kdfast.prune.scores.registry import ScoreInputs, score
from kdfast.teacher.cache import TeacherCache

BAR = 0.85
# Method, options, which input, whether the bar holds for it, whether flipped labels are expected at the lower end.
ROWS = (
    ("random", {}, None, False, False),
    ("forgetting", {}, "dynamics", True, False),
    ("forgetting", {"never_learned": "zero"}, "dynamics", False, False),
    ("el2n", {"use": "dynamics"}, "dynamics", True, False),
    ("el2n", {"use": "cache"}, "cache", True, False),
    ("grand", {"use": "dynamics"}, "dynamics", True, False),
    ("grand", {"use": "cache"}, "cache", True, False),
    ("memorization", {}, "memorization", True, False),
    ("memorization", {"measure": "p_y"}, "memorization", False, False),
    ("influence", {"kind": "self"}, "cache", True, False),
    ("influence", {"kind": "removal"}, "cache", True, True),
    ("influence", {"kind": "absolute"}, "cache", False, False),
    ("aum", {}, "dynamics", False, False),
    ("ccs", {}, "dynamics", False, False),
    ("dual", {}, "dynamics", False, False),
    ("d2", {"score": "el2n"}, "dynamics", False, False),
    ("moderate", {"use": "dynamics"}, "dynamics", False, False),
    ("moderate", {"use": "cache"}, "cache", False, False),
)


def auc(values: np.ndarray, planted: np.ndarray) -> float:
    """P[value of a planted sample > value of another], ties counting one half."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    hits = int(planted.sum())
    return float((ranks[planted].sum() - hits * (hits + 1) / 2) / (hits * (len(planted) - hits)))


def main() -> None:
    arguments = parse()
    source = open_source(arguments.data)
    true = open_source(read_json(Path(arguments.data) / "relabelled.json")["data"])
    planted = source.train.labels != true.train.labels
    base = {"labels": source.train.labels, "seed": arguments.seed}
    held: dict[str | None, ScoreInputs] = {None: ScoreInputs(**base)}
    if arguments.cache:
        cache = TeacherCache.open(arguments.cache, source=true)
        held["cache"] = ScoreInputs(**base, logits=cache.identity_logits(), features=cache.features())
    for name in ("dynamics", "memorization"):
        if path := getattr(arguments, name):
            opened = Dynamics.open(path, labels=source.train.labels, fingerprint=source.fingerprint)
            held[name] = ScoreInputs(**base, dynamics=opened)
    rows = [measure(row, held[row[2]], planted) for row in ROWS if row[2] in held]
    print(table(rows))
    facts = {name: describe(inputs) for name, inputs in held.items() if inputs.dynamics}
    path = write_results("planted", rows, planted=int(planted.sum()), samples=len(planted), recorded=facts)
    print(f"\n{int(planted.sum())} of {len(planted)} labels flipped; written to {path}")
    if low := [f"{row['method']} {row['options']}" for row in rows if row["bar"] and float(row["AUC"]) < row["bar"]]:
        sys.exit(f"below {BAR}: {', '.join(low)}")


def measure(row: tuple, inputs: ScoreInputs, planted: np.ndarray) -> dict:
    """One line of the table."""
    method, options, origin, barred, lower = row
    given = ScoreInputs(**{**vars(inputs), "options": options})
    started = time.perf_counter()
    try:
        values = score(method, given).values
    except KdfastError as error:
        sys.exit(f"{method} {options}: {error}")
    seconds = time.perf_counter() - started
    signed = -values if lower else values
    top = np.argsort(-signed, kind="stable")[: planted.sum()]
    return {
        "method": method,
        "options": ", ".join(f"{k}={v}" for k, v in options.items() if k != "use"),
        "from": origin or "",
        "flipped at": "low end" if lower else "high end",
        "AUC": f"{auc(signed, planted):.4f}",
        "top": f"{planted[top].mean():.3f}",
        "bar": BAR if barred else "",
        "seconds": f"{seconds:.2f}",
    }


def describe(inputs: ScoreInputs) -> dict:
    """Runs, epochs and settings of dynamics."""
    dynamics = inputs.dynamics
    training = dynamics.facts.get("training", {})
    kept = ("student", "epochs", "batch_size", "lr", "weight_decay", "schedule", "views", "precision", "seed")
    return {
        "runs": dynamics.runs,
        "epochs": dynamics.epochs,
        "keep": dynamics.facts.get("keep"),
        **{name: training.get(name) for name in kept},
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="written by `kdfast data flip`")
    parser.add_argument("--dynamics", help="of a run on it")
    parser.add_argument("--memorization", help="dynamics of runs with --keep")
    parser.add_argument("--cache", help="a teacher's cache of the data with the true labels")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
