"""Sections of the score page. Each returns markup, or None if there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import Subset
from kdfast.report import charts
from kdfast.report.gallery import render_kept_and_dropped, render_samples
from kdfast.report.markup import Safe, render, statistics_list, table, tag
from kdfast.report.score_data import ScorePageData
from kdfast.report.score_statistics import (
    Matrix,
    class_counts,
    classes_by_mean_score,
    compute_overlaps,
    highest_samples,
    rank_correlations,
)

# Maximum number of small histograms; with more classes, those of highest and lowest mean score are shown.
_MAX_HISTOGRAMS = 100
# Maximum number of columns with names below them.
_MAX_NAMED_COLUMNS = 12
# Keys of a subset's provenance that the page omits: it shows the data elsewhere, and the digest was checked on reading.
_OMITTED = ("data", "ids")


def render_statistics(data: ScorePageData) -> Safe:
    """Render the numbers at the top."""
    n = len(data.source.train)
    pairs = [("Training samples", f"{n:,}"), ("Classes", f"{len(data.source.classes):,}")]
    if data.scored is not None:
        scores = data.scored.scores
        pairs += [
            ("Method", data.scored.method),
            ("Median score", f"{np.median(scores):.3g}"),
            ("Range", f"{scores.min():.2g} to {scores.max():.2g}"),
            ("Scoring time", f"{data.scored.seconds:.3g} s"),
        ]
    for name, subset in data.subsets.items():
        pairs.append((f"Kept in {name}", f"{len(subset.ids):,} ({len(subset.ids) / n:.1%})"))
    return statistics_list(pairs)


def render_histograms(data: ScorePageData) -> Safe | None:
    """Render a large histogram of all samples and a small one per class, with the samples that each subset keeps."""
    if data.scored is None:
        return None
    scores, labels = data.scored.scores, data.source.train.labels
    bins = charts.Bins.of(scores)
    subsets = {name: subset.ids for name, subset in data.subsets.items()}
    label = f"Histogram of {data.scored.method} scores of all samples"
    kept_counts = [bins.count(scores[ids]) for ids in subsets.values()]
    chart = charts.histogram(bins.count(scores), kept_counts, bins, label)
    caption = tag("figcaption", _legend(list(subsets)), "The outer bins include the 0.5% of samples beyond each end.")
    small_bins = charts.Bins.of(scores, 28)
    shown, note = _histogram_classes(labels, scores, len(data.source.classes))
    figures = []
    for label_id in shown:
        members = labels == label_id
        title, mean = data.source.classes[label_id], float(scores[members].mean())
        small = charts.small_histogram(
            small_bins.count(scores[members]),
            [small_bins.count(scores[ids[labels[ids] == label_id]]) for ids in subsets.values()],
            f"Scores of class {title}, mean {mean:.3g}",
        )
        lines = [tag("strong", title), tag("br"), f"mean {mean:.3g}", tag("br"), f"{int(members.sum()):,} samples"]
        figures.append(tag("figure", small, tag("figcaption", lines)))
    heading = tag("h3", "Per class, on the same axis, hardest first")
    return render([tag("figure", chart, caption), heading, note, tag("div", figures, class_="small-multiples")])


def render_balance(data: ScorePageData) -> Safe | None:
    """Render the share of each class that every subset keeps."""
    parts = [_render_class_shares(data, name, subset) for name, subset in data.subsets.items()]
    return render(parts) if parts else None


def render_overlap(data: ScorePageData) -> Safe | None:
    """Render the agreement of the scores and the overlap of the subsets."""
    parts: list[Safe] = []
    scores = {name: scored.scores for name, scored in data.score_files.items()}
    if len(scores) > 1:
        highest = {name: highest_samples(values, data.fraction) for name, values in scores.items()}
        share = f"{data.fraction:.3g}"
        caption = (
            f"Share of the highest-scoring samples ({share} of all) that two methods have in common; {share} by chance"
        )
        parts.append(_render_matrix(caption, list(scores), compute_overlaps(highest), "{:.0%}"))
        caption = "Rank correlation of the scores (Spearman)"
        parts.append(_render_matrix(caption, list(scores), rank_correlations(scores), "{:.2f}"))
    if len(data.subsets) > 1:
        sets = {name: subset.ids for name, subset in data.subsets.items()}
        caption = "Share of the row's subset that is also in the column's subset"
        parts.append(_render_matrix(caption, list(sets), compute_overlaps(sets), "{:.0%}"))
    return tag("div", parts, class_="side") if parts else None


def render_provenance(data: ScorePageData) -> Safe:
    """Render the origin of the data, scores, subsets and predictions."""
    rows: list[list[object]] = [
        ["Data", f"{data.source.path} ({data.source.kind})"],
        ["Data fingerprint", tag("code", data.source.fingerprint)],
    ]
    for name, scored in data.score_files.items():
        rows.append([f"Scores: {name}", _format_mapping({**scored.parameters, "seconds": round(scored.seconds, 3)})])
        rows.append(["Digest", tag("code", scored.digest)])
        rows += [[f"Digest of the {what} used", tag("code", digest)] for what, digest in scored.sources.items()]
    for name, subset in data.subsets.items():
        content: object = "no idx.json beside it"
        if subset.provenance is not None:
            content = _format_mapping({k: v for k, v in subset.provenance.items() if k not in _OMITTED})
        rows.append([f"Subset: {name}", content])
    if data.cache is not None:
        teacher = data.cache.manifest["teacher"]
        rows.append(
            ["Teacher", _format_mapping({k: v for k, v in teacher.items() if isinstance(v, str | int | float)})]
        )
        rows.append(["Teacher accuracy on the training split", f"{data.cache.manifest['train_top1']:.2f}%"])
    return table("Inputs of this page", ["input", "value"], rows, class_="provenance")


# Sections in the order of the page: heading and function by anchor.
SECTIONS: dict[str, tuple[str, Callable[[ScorePageData], Safe | None]]] = {
    "scores": ("Scores by class", render_histograms),
    "samples": ("Highest and lowest samples", render_samples),
    "kept": ("Kept and dropped samples", render_kept_and_dropped),
    "balance": ("Class balance", render_balance),
    "overlap": ("Overlap between methods", render_overlap),
    "provenance": ("Provenance", render_provenance),
}


def _render_class_shares(data: ScorePageData, name: str, subset: Subset) -> Safe:
    classes = data.source.classes
    sizes, kept = class_counts(data.source.train.labels, subset.ids, len(classes))
    share = kept / np.maximum(sizes, 1)
    level = len(subset.ids) / len(data.source.train)
    order = np.argsort(-share, kind="stable")
    titles = [f"{classes[i]}: {kept[i]:,} of {sizes[i]:,} ({share[i]:.1%})" for i in order]
    least, most = int(order[-1]), int(order[0])
    spread = "the same share of every class"
    if share[least] != share[most]:
        spread = f"from {share[least]:.1%} of {classes[least]} to {share[most]:.1%} of {classes[most]}"
    names = [classes[i] for i in order] if len(classes) <= _MAX_NAMED_COLUMNS else []
    label = f"Share kept of each class in {name}"
    chart = charts.column_chart(share[order].tolist(), titles, names, level, label)
    caption = f"{name} keeps {level:.1%} of all samples: {spread}. The dashed line is the share of all samples."
    rows = [[classes[i], f"{sizes[i]:,}", f"{kept[i]:,}", f"{share[i]:.1%}"] for i in range(len(classes))]
    numbers = table(f"Class balance of {name}", ["class", "in the data", "kept", "share kept"], rows)
    figure = tag("figure", chart, tag("figcaption", caption))
    return render([tag("h3", name), figure, tag("details", tag("summary", "As a table"), numbers)])


def _legend(names: Sequence[str]) -> Safe:
    """Return the colors of a histogram: bars of all samples, and of one subset; lines of several."""
    keys = [tag("span", tag("span", class_="key all"), "all samples")]
    for number, name in enumerate(names, 1):
        kind = "kept" if len(names) == 1 else f"line {charts.outline(number)}"
        keys.append(tag("span", tag("span", class_=f"key {kind}"), f"kept in {name}"))
    return tag("span", keys, class_="keys")


def _histogram_classes(labels: IntArray, scores: Matrix, classes: int) -> tuple[list[int], Safe | None]:
    """Return the classes by mean score, hardest first, and a note if some are omitted."""
    order = classes_by_mean_score(scores, labels, classes)
    if len(order) <= _MAX_HISTOGRAMS:
        return order, None
    half = _MAX_HISTOGRAMS // 2
    text = f"The {half} classes with the highest and the {half} with the lowest mean score, out of {len(order)}."
    return [*order[:half], *order[-half:]], tag("p", text, class_="note")


def _render_matrix(caption: str, names: Sequence[str], values: Matrix, form: str) -> Safe:
    rows = []
    for name, numbers in zip(names, values, strict=True):
        cells = [tag("td", form.format(v), style=f"background: rgb(var(--heat) / {_opacity(v)})") for v in numbers]
        rows.append([name, *cells])
    return table(caption, ["", *names], rows)


def _opacity(value: float) -> str:
    """Return the opacity of a cell's color, low enough to keep the text readable."""
    return f"{0.45 * min(max(value, 0.0), 1.0):.2f}" if np.isfinite(value) else "0"


def _format_mapping(values: dict[str, object]) -> Safe:
    """Format a mapping as one line of text."""
    parts = [f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]
    return render("; ".join(parts))
