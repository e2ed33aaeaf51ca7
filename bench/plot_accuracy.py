"""Draw test accuracy against the kept fraction, by the weight of the teacher, from runs at the paper's recipe.

    python bench/plot_accuracy.py --out docs/images/accuracy.svg

Plots random subsets of CIFAR-100 from bench/results/fig3.jsonl and fig6.jsonl, runs of `kdfast reproduce`: every
student is a dot, lines join the means over seeds. Diamonds are students of all data, trained for as many steps as those
of the subset.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from harness import RESULTS, read_rows
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

# Weight of the teacher's loss -> label and color.
STYLES = {1.0: ("teacher", "#0b6e99"), 0.5: ("teacher and labels", "#6aa84f"), 0.0: ("labels", "#b35c1e")}
Points = dict[float, list[float]]


def accuracies(rows: list[dict[str, Any]], alpha: float, *, all_data: bool) -> Points:
    """Return test accuracies by the kept fraction, one value per seed.

    Args:
        rows: Rows of `bench/study_rows.py`.
        alpha: Weight of the teacher's loss.
        all_data: Whether to return the runs on all data for the steps of the fraction in place of those on subsets.
    """
    found: Points = defaultdict(list)
    for row in rows:
        cell = row["cell"]
        fraction = cell.get("match_steps_of") if all_data else cell["fraction"]
        whole = row["compressed_to"] is None and (cell["fraction"] == 1) == all_data
        if cell["method"] == "random" and row["alpha"] == alpha and whole and fraction is not None:
            found[fraction].append(row["test_top1"])
    return dict(sorted(found.items()))


def draw(axes: Axes, rows: list[dict[str, Any]], fractions: list[float], alpha: float) -> None:
    """Draw the students of one weight."""
    label, color = STYLES[alpha]
    subsets = accuracies(rows, alpha, all_data=False)
    means = {fractions.index(fraction): statistics.mean(values) for fraction, values in subsets.items()}
    axes.plot(list(means), list(means.values()), color=color, linewidth=2)
    for marker, fill, points in (("o", color, subsets), ("D", "white", accuracies(rows, alpha, all_data=True))):
        for fraction, values in points.items():
            place, mean = fractions.index(fraction), statistics.mean(values)
            axes.plot([place] * len(values), values, marker, color=color, markerfacecolor=fill)
            axes.annotate(
                f"{mean:.1f}", (place, mean), (-10, 2), textcoords="offset points", color=color, ha="right", va="center"
            )
    last = max(means)
    axes.annotate(label, (last, means[last]), (12, 6), textcoords="offset points", color=color, va="center")


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Write the figure; SVG files are reproducible byte for byte with one version of matplotlib."""
    plt.rcParams.update({"svg.hashsalt": "kdfast", "font.size": 11})
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    fractions = sorted({f for alpha in STYLES for f in accuracies(rows, alpha, all_data=False)})
    for alpha in STYLES:
        draw(axes, rows, fractions, alpha)
    axes.set(xlim=(-0.4, len(fractions) - 0.4), xlabel="share of the training set kept", ylabel="test accuracy, %")
    axes.set_xticks(range(len(fractions)), [f"{100 * fraction:g}%" for fraction in fractions])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("CIFAR-100, random subsets, ResNet-32, 240 epochs", loc="left", fontsize=11)
    markers = (("o", "gray", "subset"), ("D", "white", "all data, the same steps"))
    handles = [
        Line2D([], [], marker=marker, color="gray", markerfacecolor=fill, linestyle="", label=text)
        for marker, fill, text in markers
    ]
    axes.legend(handles=handles, frameon=False, loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor="white", metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Read the rows and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="image to write, .svg or .png")
    options = parser.parse_args()
    plot([row for study in ("fig3", "fig6") for row in read_rows(RESULTS / f"{study}.jsonl")], options.out)


if __name__ == "__main__":
    main()
