"""The sections of the page about scores; each gives markup, or None where there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.report import charts
from kdfast.report.markup import Safe, render, table, tag
from kdfast.report.score_facts import (
    Example,
    Table,
    class_shares,
    examples,
    extremes,
    hardest,
    rank_correlations,
    shared,
    telling_classes,
)

if TYPE_CHECKING:
    from kdfast.report.score_page import ScorePage

# Small histograms shown at most: of more classes, those of highest and lowest mean score.
_MOST_CLASSES = 100
# Columns of classes that have room for a name below.
_NAMED_COLUMNS = 12
# Probability below which a class is no prediction worth a line.
_NEGLIGIBLE = 0.005
# What a subset's provenance need not say here: the data above, and a digest that the file was checked with.
_SAID = ("data", "ids")


def facts(page: ScorePage) -> Safe:
    """The numbers at the top."""
    scores = page.scored.scores
    pairs = [
        ("Training samples", f"{len(scores):,}"),
        ("Classes", f"{len(page.source.classes):,}"),
        ("Method", page.scored.method),
        ("Median score", f"{np.median(scores):.3g}"),
        ("Range", f"{scores.min():.2g} to {scores.max():.2g}"),
        ("Scoring took", f"{page.scored.seconds:.3g} s"),
    ]
    pairs += [
        (f"Kept in {name}", f"{len(s.ids):,} ({len(s.ids) / len(scores):.1%})") for name, s in page.subsets.items()
    ]
    return tag("dl", (tag("div", tag("dt", what), tag("dd", value)) for what, value in pairs), class_="facts")


def histograms(page: ScorePage) -> Safe:
    """One large histogram of all samples, a small one for each class."""
    scores, labels = page.scored.scores, page.source.train.labels
    bins, small = charts.Bins.of(scores), charts.Bins.of(scores, 28)
    name, kept = _first_subset(page)
    legend = render([tag("span", class_="key all"), "all samples"])
    if kept is not None:
        legend = render([legend, tag("span", class_="key kept"), f"kept in {name}"])
    large = tag(
        "figure",
        charts.histogram(
            bins.count(scores),
            _kept(scores, kept, bins),
            bins,
            f"Histogram of {page.scored.method} scores of all samples",
        ),
        tag("figcaption", legend, ". The outermost bins also hold the 0.5% of samples beyond them."),
    )
    shown, note = _shown_classes(page)
    figures = []
    for label in shown:
        mine = labels == label
        kept_here = None if kept is None else kept[labels[kept] == label]
        title = page.source.classes[label]
        mean = float(scores[mine].mean())
        drawing = charts.small_histogram(
            small.count(scores[mine]),
            _kept(scores, kept_here, small),
            f"Scores of class {title}, mean {mean:.3g}",
        )
        size = f"{int(mine.sum()):,} samples"
        caption = tag("figcaption", tag("strong", title), tag("br"), f"mean {mean:.3g}", tag("br"), size)
        figures.append(tag("figure", drawing, caption))
    heading = tag("h3", "Each class, on the same axis, hardest first")
    return render([large, heading, note, tag("div", figures, class_="smalls")])


def samples(page: ScorePage) -> Safe:
    """The samples of highest and lowest score of a few classes, with the teacher's predictions."""
    scores, labels = page.scored.scores, page.source.train.labels
    parts: list[Safe] = []
    if page.cache is not None:
        text = "Under each image: its score, and the teacher's likeliest classes. A red frame: the teacher's first "
        parts.append(tag("p", text + "choice is not the label.", class_="note"))
    else:
        parts.append(
            tag("p", "Under each image: its score. A teacher's cache would add its predictions.", class_="note")
        )
    for label in telling_classes(scores, labels, page.few):
        parts.append(tag("h3", f"Label: {page.source.classes[label]}"))
        ends = extremes(scores, labels, label, page.each)
        for title, ids in zip(("Highest scores", "Lowest scores"), ends, strict=True):
            found = examples(ids, scores, page.source.train, page.cache)
            cells = [_sample(page, example, label) for example in found]
            name = f"{title} of class {page.source.classes[label]}"
            parts.append(tag("p", title, class_="note"))
            parts.append(tag("ul", cells, class_="samples", aria_label=name))
    return render(parts)


def balance(page: ScorePage) -> Safe | None:
    """What share of each class every subset keeps."""
    parts: list[Safe] = []
    classes = page.source.classes
    for name, subset in page.subsets.items():
        sizes, kept = class_shares(page.source.train.labels, subset.ids, len(classes))
        share = kept / np.maximum(sizes, 1)
        level = len(subset.ids) / len(page.source.train)
        order = np.argsort(-share, kind="stable")
        titles = [f"{classes[i]}: {kept[i]:,} of {sizes[i]:,} ({share[i]:.1%})" for i in order]
        least, most = int(order[-1]), int(order[0])
        spread = f"of {classes[least]} {share[least]:.1%}, of {classes[most]} {share[most]:.1%}"
        text = f"{name} keeps {level:.1%} of all samples; " + (
            "of every class alike" if share[least] == share[most] else spread
        )
        under = [classes[i] for i in order] if len(classes) <= _NAMED_COLUMNS else []
        chart = charts.columns(share[order].tolist(), titles, under, level, f"Share kept of each class in {name}")
        rows = [[classes[i], f"{sizes[i]:,}", f"{kept[i]:,}", f"{share[i]:.1%}"] for i in range(len(classes))]
        numbers = table(f"Class balance of {name}", ["class", "in the data", "kept", "share kept"], rows)
        caption = tag("figcaption", text, ". One column a class; the dashed line is the share of the whole.")
        parts.append(tag("h3", name))
        parts.append(tag("figure", chart, caption))
        parts.append(tag("details", tag("summary", "As a table"), numbers))
    return render(parts) if parts else None


def overlap(page: ScorePage) -> Safe | None:
    """How much the scores agree, and the subsets."""
    parts: list[Safe] = []
    scores = {page.scored.method: page.scored.scores, **{name: other.scores for name, other in page.others.items()}}
    if len(scores) > 1:
        tops = {name: hardest(values, page.fraction) for name, values in scores.items()}
        part = f"{page.fraction:.3g}"
        text = (
            f"Share of the samples of highest score ({part} of all) that two methods have in common; by chance {part}"
        )
        parts.append(_matrix(text, list(scores), shared(tops), "{:.0%}"))
        text = "Rank correlation of the scores (Spearman)"
        parts.append(_matrix(text, list(scores), rank_correlations(scores), "{:.2f}"))
    if len(page.subsets) > 1:
        sets = {name: subset.ids for name, subset in page.subsets.items()}
        parts.append(_matrix("Share of the row's subset that the column's has too", list(sets), shared(sets), "{:.0%}"))
    return tag("div", parts, class_="side") if parts else None


def provenance(page: ScorePage) -> Safe:
    """Where everything comes from."""
    rows = [
        ["Data", f"{page.source.path} ({page.source.kind})"],
        ["Fingerprint of the data", _code(page.source.fingerprint)],
    ]
    for name, scored in {page.scored.method: page.scored, **page.others}.items():
        rows.append([f"Scores: {name}", _listed({**scored.parameters, "seconds": round(scored.seconds, 3)})])
        rows.append(["Digest", _code(scored.digest)])
        rows += [[f"Made from the {what} with digest", _code(digest)] for what, digest in scored.sources.items()]
    for name, subset in page.subsets.items():
        about = subset.provenance
        rows.append(
            [
                f"Subset: {name}",
                "no idx.json beside it"
                if about is None
                else _listed({k: v for k, v in about.items() if k not in _SAID}),
            ]
        )
    if page.cache is not None:
        teacher = page.cache.manifest["teacher"]
        rows.append(["Teacher", _listed({k: v for k, v in teacher.items() if isinstance(v, str | int | float)})])
        rows.append(["Its accuracy on the training split", f"{page.cache.manifest['train_top1']:.2f}%"])
    return table("What the page was made from", ["what", "value"], rows, class_="provenance")


def _sample(page: ScorePage, example: Example, label: int) -> Safe:
    classes = page.source.classes
    lines = []
    for place, (guess, odds) in enumerate(example.predictions):
        if place and odds < _NEGLIGIBLE:
            break
        kind = "right" if guess == label else "wrong" if place == 0 else "other"
        mark = "✓ " if guess == label else "✗ " if place == 0 else ""
        lines.append(tag("span", f"{mark}{classes[guess]} {odds:.0%}", class_=kind))
    differs = bool(example.predictions) and example.predictions[0][0] != label
    alt = f"Sample {example.id}, label {classes[label]}, score {example.score:.3g}"
    picture = tag("img", src=example.picture, alt=alt, title=f"sample {example.id}", loading="lazy")
    score = tag("span", f"{example.score:.3g}", class_="score")
    return tag("li", picture, score, lines, class_="differs" if differs else None)


def _first_subset(page: ScorePage) -> tuple[str, IntArray | None]:
    for name, subset in page.subsets.items():
        return name, subset.ids
    return "", None


def _kept(scores: charts.Floats, ids: IntArray | None, bins: charts.Bins) -> charts.Counts | None:
    return None if ids is None else bins.count(scores[ids])


def _shown_classes(page: ScorePage) -> tuple[list[int], Safe | None]:
    """Classes by mean score, hardest first, and a note where some are left out."""
    order = telling_classes(page.scored.scores, page.source.train.labels, len(page.source.classes))
    if len(order) <= _MOST_CLASSES:
        return order, None
    half = _MOST_CLASSES // 2
    text = f"The {half} classes of highest and the {half} of lowest mean score, of {len(order)}."
    return [*order[:half], *order[-half:]], tag("p", text, class_="note")


def _matrix(caption: str, names: Sequence[str], values: Table, form: str) -> Safe:
    rows = []
    for name, numbers in zip(names, values, strict=True):
        cells = [tag("td", form.format(v), style=f"background: rgb(var(--heat) / {_tint(v)})") for v in numbers]
        rows.append([name, *cells])
    return table(caption, ["", *names], rows)


def _tint(value: float) -> str:
    """Opacity of a cell's colour: never so strong that the text would lack contrast."""
    return f"{0.45 * min(max(value, 0.0), 1.0):.2f}" if np.isfinite(value) else "0"


def _code(text: str) -> Safe:
    return tag("code", text)


def _listed(values: dict[str, object]) -> Safe:
    """A mapping in one line of text."""
    parts = [f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]
    return render("; ".join(parts))
