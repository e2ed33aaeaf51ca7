"""Draw test accuracy against the kept fraction, with and without the teacher, from the rows of a sweep.

    python bench/plot_accuracy.py --out docs/images/accuracy.svg

Plots random class-balanced subsets of CIFAR-100 from bench/results/sweep_cifar100.jsonl: every student is a dot, lines
join the means over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

ROWS = Path(__file__).parent / "results" / "sweep_cifar100.jsonl"
STYLES = {True: ("with the teacher", "#0b6e99"), False: ("without", "#b35c1e")}


def accuracies(rows: list[dict[str, Any]], kd: bool) -> dict[float, list[float]]:
    """Return the test accuracies of random subsets by kept fraction, one value per seed."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if row["method"] == "random" and row["kd"] == kd:
            found[row["fraction"]].append(row["test_top1"])
    return dict(sorted(found.items()))


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Write the figure; SVG files are reproducible byte for byte with one version of matplotlib."""
    plt.rcParams.update({"svg.hashsalt": "kdfast", "font.size": 11})
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for kd, (label, color) in STYLES.items():
        found = accuracies(rows, kd)
        means = [statistics.mean(values) for values in found.values()]
        axes.plot(list(found), means, color=color, linewidth=2)
        for fraction, values in found.items():
            axes.plot([fraction] * len(values), values, "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
        axes.annotate(label, (max(found), means[-1]), (10, 0), textcoords="offset points", color=color, va="center")
        axes.annotate(
            f"{means[0]:.1f}", (min(found), means[0]), (-10, 0), textcoords="offset points", color=color,
            ha="right", va="center",
        )  # fmt: skip
    axes.set(xlim=(0.02, 0.66), ylim=(14, 26), xlabel="share of the training set kept", ylabel="test accuracy, %")
    axes.set_xticks(list(found))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("CIFAR-100, random subsets, ResNet-8 student", loc="left", fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor="white", metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Read the rows and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, help="results.jsonl of a sweep")
    parser.add_argument("--out", type=Path, required=True, help="image to write, .svg or .png")
    options = parser.parse_args()
    plot([json.loads(line) for line in options.rows.read_text().splitlines()], options.out)


if __name__ == "__main__":
    main()
