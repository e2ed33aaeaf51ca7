r"""How well each score finds training labels that were flipped on purpose.

    kdfast data flip cifar-10-batches-py noisy10 --share 0.1 --seed 0
    kdfast dynamics --data noisy10 --net resnet8 --epochs 15 --features-every 5 ... --out dyn
    python bench/bench_planted.py --data noisy10 --dynamics dyn --cache c10 [--memorization mem]

With a teacher that was itself trained on the flipped labels, for --share 0.1 and 0.4:

    kdfast teacher train --data noisy10 ... --out teacher.pt
    kdfast cache --data noisy10 --teacher teacher.pt --views 1 --out own
    kdfast teacher flatten --data cifar-10-batches-py --teacher teacher.pt --out flat.pt    # held-out labels are true
    kdfast teacher flatten --data noisy10 --teacher teacher.pt --out flat-noisy.pt          # or flipped as the others
    kdfast score --data noisy10 --method influence-fvm --teacher flat.pt --out fvm.npz
    python bench/bench_planted.py --data noisy10 --dynamics dyn --own-cache own --scores clean=fvm.npz \
        --held-out flat.pt --name planted_own_10

--cache is that of a teacher trained on the true labels; scores combine its logits and features with the flipped
labels. --own-cache is that of a teacher trained on the flipped labels. --scores adds the scores of a file; the name
"clean" says that the teacher was flattened on true labels, for which there is a target. --held-out leaves out the
samples that a flattened teacher was fine-tuned on, whose scores are not comparable, in all rows.

AUC is the probability that a flipped sample scores higher than another one (lower for the influence of removal, which
is negative for harmful samples). "top" is the share of flipped samples among the highest (lowest) scores, as many as
there are flipped samples. "seconds" excludes opening the inputs. Prints a table and writes bench/results/<name>.json.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from harness import table, write_results

from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import KdfastError
from kdfast.files import read_json
from kdfast.nets.checkpoint import load_model
from kdfast.pruning.score_file import ScoreFile, read_scores
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.fvm import held_out_samples
from kdfast.pruning.scores.registry import compute_score
from kdfast.teacher.cache import TeacherCache

TARGET_AUC = 0.85
FVM_TARGET_AUC = 0.95  # of influence-fvm after flattening on true labels
# Method, options, input, whether the target applies, whether flipped labels should have the lowest scores.
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
    ("medium", {}, "cache", False, False),
    ("medium", {}, "own cache", False, False),
    ("el2n", {"use": "cache"}, "own cache", False, False),
    ("grand", {"use": "cache"}, "own cache", False, False),
    ("influence", {"kind": "self"}, "own cache", False, False),
    ("influence", {"kind": "self", "polish": "no"}, "own cache", False, False),
    ("influence", {"kind": "removal"}, "own cache", False, True),
)


def auc(values: np.ndarray, planted: np.ndarray) -> float:
    """Return P[value of a sample with a flipped label > value of another], with ties counted as one half."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    count = int(planted.sum())
    return float((ranks[planted].sum() - count * (count + 1) / 2) / (count * (len(planted) - count)))


def main() -> None:
    arguments = parse_arguments()
    source = open_source(arguments.data)
    original = open_source(read_json(Path(arguments.data) / "relabelled.json")["data"])
    planted = source.train.labels != original.train.labels
    base = {"labels": source.train.labels, "seed": arguments.seed}
    inputs: dict[str | None, ScoreInputs] = {None: ScoreInputs(**base)}
    for name, path, data in (("cache", arguments.cache, original), ("own cache", arguments.own_cache, source)):
        if path:
            cache = TeacherCache.open(path, source=data)
            inputs[name] = ScoreInputs(**base, logits=cache.identity_logits(), features=cache.features())
    for name in ("dynamics", "memorization"):
        if path := getattr(arguments, name):
            opened = Dynamics.open(path, labels=source.train.labels, fingerprint=source.fingerprint)
            inputs[name] = ScoreInputs(**base, dynamics=opened)
    judged = judged_samples(arguments.held_out, source, original)
    rows = [measure(row, inputs[row[2]], planted, judged) for row in ROWS if row[2] in inputs]
    for text in arguments.scores:
        name, _, path = text.partition("=")
        scores = read_scores(path, n=len(planted), fingerprint=source.fingerprint)
        rows.append(file_row(name, scores, planted, judged))
    print(table(rows))
    recorded = {name: describe(given.dynamics) for name, given in inputs.items() if given.dynamics}
    counts = {"planted": int(planted.sum()), "samples": len(planted), "judged": len(judged)}
    path = write_results(arguments.name, rows, **counts, recorded=recorded)
    print(f"\n{counts['planted']} of {len(planted)} labels flipped, {len(judged)} samples judged; written to {path}")
    if low := [f"{row['method']} {row['options']}" for row in rows if row["bar"] and float(row["AUC"]) < row["bar"]]:
        sys.exit(f"below the target AUC: {', '.join(low)}")


def judged_samples(flattened: str | None, source: Source, original: Source) -> np.ndarray:
    """Return the samples to judge: all but those that a flattened teacher was fine-tuned on, if one is given."""
    everything = np.arange(len(source.train))
    if flattened is None:
        return everything
    model = load_model(flattened)
    data = next(d for d in (original, source) if d.fingerprint == model.metadata["flattened"]["data"])
    return np.setdiff1d(everything, held_out_samples(model, data))


def measure(row: tuple, inputs: ScoreInputs, planted: np.ndarray, judged: np.ndarray) -> dict:
    """Compute one score and return its row of the table."""
    method, options, origin, has_target, lower = row
    inputs = ScoreInputs(**{**vars(inputs), "options": options})
    started = time.perf_counter()
    try:
        values = compute_score(method, inputs).values
    except KdfastError as error:
        sys.exit(f"{method} {options}: {error}")
    seconds = time.perf_counter() - started
    signed = -values if lower else values
    return {
        "method": method,
        "options": ", ".join(f"{k}={v}" for k, v in options.items() if k != "use"),
        "from": origin or "",
        "flipped at": "low end" if lower else "high end",
        **separation(signed[judged], planted[judged]),
        "bar": TARGET_AUC if has_target else "",
        "seconds": f"{seconds:.2f}",
    }


def file_row(name: str, scores: ScoreFile, planted: np.ndarray, judged: np.ndarray) -> dict:
    """Return the row of a score file."""
    shown = ("kind", "fisher", "damping", "views", "layers", "sharpness")
    return {
        "method": scores.method,
        "options": ", ".join(f"{k}={scores.parameters[k]}" for k in shown if k in scores.parameters),
        "from": name,
        "flipped at": "high end",
        **separation(scores.scores[judged], planted[judged]),
        "bar": FVM_TARGET_AUC if (scores.method, name) == ("influence-fvm", "clean") else "",
        "seconds": f"{scores.seconds:.2f}",
    }


def separation(values: np.ndarray, planted: np.ndarray) -> dict:
    """Return how well values separate the planted samples, which should be the highest."""
    top = np.argsort(-values, kind="stable")[: planted.sum()]
    return {"AUC": f"{auc(values, planted):.4f}", "top": f"{planted[top].mean():.3f}"}


def describe(dynamics: Dynamics) -> dict:
    """Return the number of runs and epochs, and the training settings."""
    training = dynamics.facts.get("training", {})
    kept = ("student", "epochs", "batch_size", "lr", "weight_decay", "schedule", "views", "precision", "seed")
    return {
        "runs": dynamics.runs,
        "epochs": dynamics.epochs,
        "keep": dynamics.facts.get("keep"),
        **{name: training.get(name) for name in kept},
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="written by `kdfast data flip`")
    parser.add_argument("--dynamics", help="dynamics of a run on the data")
    parser.add_argument("--memorization", help="dynamics of runs with --keep on the data")
    parser.add_argument("--cache", help="a teacher's cache of the data with the true labels")
    parser.add_argument("--own-cache", help="cache of a teacher trained on the flipped labels, of the data")
    parser.add_argument("--scores", action="append", default=[], metavar="NAME=FILE", help="score file; repeatable")
    parser.add_argument("--held-out", metavar="FLAT.pt", help="leave out what this flattened teacher was fine-tuned on")
    parser.add_argument("--name", default="planted", help="name of the result file")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
