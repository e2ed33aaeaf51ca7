"""Samples of a page as images: those of extreme scores, and kept beside dropped ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.data.subset import Subset
from kdfast.report.markup import Safe, render, tag
from kdfast.report.score_data import ScorePageData
from kdfast.report.score_statistics import Example, classes_by_mean_score, extreme_samples, load_examples

# Predictions below this probability are omitted, except the first.
_MIN_PROBABILITY = 0.005


def render_samples(data: ScorePageData) -> Safe | None:
    """Render the samples of highest and lowest score of a few classes, with the teacher's predictions."""
    if data.scored is None:
        return None
    parts = [tag("p", _explain(data), class_="note")]
    for label in _shown_classes(data):
        name = data.source.classes[label]
        parts.append(tag("h3", f"Label: {name}"))
        ends = extreme_samples(data.scored.scores, data.source.train.labels, label, data.samples_per_end)
        for title, ids in zip(("Highest scores", "Lowest scores"), ends, strict=True):
            parts.append(tag("p", title, class_="note"))
            parts.append(_render_list(data, ids, label, f"{title} of class {name}"))
    return render(parts)


def render_kept_and_dropped(data: ScorePageData) -> Safe | None:
    """Render samples that each subset keeps beside samples that it drops, drawn at random from a few classes."""
    if not data.subsets:
        return None
    note = (
        f"Up to {data.samples_per_end} of each kind, drawn at random (seed {data.seed}), in the same order for every "
        f"subset. {_explain(data)}"
    )
    parts = [tag("p", note, class_="note")]
    for place, (name, subset) in enumerate(data.subsets.items()):
        content = [block for label in _shown_classes(data) for block in _render_class(data, name, subset, label)]
        if len(data.subsets) == 1:
            parts += content
        else:
            parts.append(tag("details", tag("summary", name), content, open=place == 0))
    return render(parts)


def draw_samples(labels: IntArray, ids: IntArray, label: int, count: int, seed: int) -> tuple[IntArray, IntArray]:
    """Draw samples of a class that a subset keeps, and samples that it drops.

    The order of the draw depends on the seed alone, so that several subsets show the same samples where they can.

    Args:
        labels: int64 (N,).
        ids: int64 (m,), the subset.
        label: The class.
        count: Largest number of each kind.
        seed: Seed of the draw.

    Returns:
        The kept and the dropped samples, int64, at most `count` each.
    """
    members = np.flatnonzero(labels == label).astype(np.int64)
    members = members[np.argsort(hash64(Purpose.GALLERY, seed, members), kind="stable")]
    kept = np.isin(members, ids)
    return members[kept][:count], members[~kept][:count]


def _render_class(data: ScorePageData, name: str, subset: Subset, label: int) -> Iterator[Safe]:
    title, labels = data.source.classes[label], data.source.train.labels
    members = int((labels == label).sum())
    count = int((labels[subset.ids] == label).sum())
    drawn = draw_samples(labels, subset.ids, label, data.samples_per_end, data.seed)
    yield tag("h3", f"Label: {title}")
    sides = []
    for verb, number, ids in zip(("Kept", "Dropped"), (count, members - count), drawn, strict=True):
        head = tag("p", tag("strong", verb), f": {number:,} of {members:,}", class_="note")
        images = _render_list(data, ids, label, f"{verb} samples of class {title} in {name}") if number else None
        sides.append(tag("div", head, images, class_=verb.lower()))
    yield tag("div", sides, class_="beside")


def _shown_classes(data: ScorePageData) -> list[int]:
    """Return classes over the whole ranking by mean score, hardest first; without scores, over all class numbers."""
    labels = data.source.train.labels
    scores = -labels.astype(np.float64) if data.scored is None else data.scored.scores
    return classes_by_mean_score(scores, labels, data.sample_classes)


def _explain(data: ScorePageData) -> str:
    what = [] if data.scored is None else ["its score"]
    if data.cache is not None:
        what.append("the teacher's most probable classes")
    if data.files is not None:
        what.append("its file")
    shown = f"Below each image: {', '.join(what[:-1])}{' and ' if len(what) > 1 else ''}{what[-1]}. " if what else ""
    if data.cache is not None:
        return f"{shown}A red frame marks images whose first prediction differs from the label."
    return f"{shown}With a teacher's cache, the page also shows the teacher's predictions."


def _render_list(data: ScorePageData, ids: IntArray, label: int, name: str) -> Safe:
    scores = None if data.scored is None else data.scored.scores
    examples = load_examples(ids, scores, data.source.train, data.cache)
    items = [_render_example(data, example, label) for example in examples]
    return tag("ul", items, class_="samples", aria_label=name)


def _render_example(data: ScorePageData, example: Example, label: int) -> Safe:
    classes = data.source.classes
    lines = []
    for place, (predicted, probability) in enumerate(example.predictions):
        if place and probability < _MIN_PROBABILITY:
            break
        kind = "right" if predicted == label else "wrong" if place == 0 else "other"
        mark = "✓ " if predicted == label else "✗ " if place == 0 else ""
        lines.append(tag("span", f"{mark}{classes[predicted]} {probability:.0%}", class_=kind))
    differs = bool(example.predictions) and example.predictions[0][0] != label
    alt, title = f"Sample {example.id}, label {classes[label]}", f"sample {example.id}"
    score = None
    if example.score is not None:
        alt += f", score {example.score:.3g}"
        score = tag("span", f"{example.score:.3g}", class_="score")
    if data.files is not None:
        path = _relative(data.files, example.id, data.source.path)
        title += f", {path}"
        lines.append(tag("span", os.path.basename(path), title=path, class_="file"))
    image = tag("img", src=example.image, alt=alt, title=title, loading="lazy")
    return tag("li", image, score, lines, class_="differs" if differs else None)


def _relative(files: Sequence[str], sample: int, root: str) -> str:
    """Return the path of a sample's file, below the folder of the data if it is there."""
    inside = os.path.relpath(files[sample], root)
    return files[sample] if inside.startswith(os.pardir) else inside
