"""Kept and dropped samples, names of files, several subsets in one histogram, and pages about subsets alone."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source
from kdfast.data.subset import Subset
from kdfast.pruning.score_file import ScoreFile
from kdfast.report.charts import Bins, histogram
from kdfast.report.gallery import draw_samples
from kdfast.report.score_data import ScorePageData, read_score_page_data
from kdfast.report.score_page import render_score_page


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("digits")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images of each of two classes, each of one color, in training and test split."""
    for split in ("train", "test"):
        for red, name in ((0, "cat"), (255, "dog <b>")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                color = (red, 60 * number, 90)
                Image.new("RGB", (8, 8), color).save(tmp_path / split / name / f"{name[:3]}-{number}.png")
    return tmp_path


class Lists(HTMLParser):
    """The images of each list of samples by the name of the list, with the texts below them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.lists: dict[str, list[dict[str, Any]]] = {}
        self._items: list[dict[str, Any]] = []
        self.feed(html)

    def handle_starttag(self, name: str, attributes: Any) -> None:
        given = dict(attributes)
        if name == "ul" and given.get("class") == "samples":
            self._items = self.lists.setdefault(given["aria-label"], [])
        elif name == "span" and given.get("class") == "file":
            self._items[-1]["path"] = given["title"]

    def handle_startendtag(self, name: str, attributes: Any) -> None:
        if name == "img":
            given = dict(attributes)
            sample = re.match(r"Sample (\d+), label", given["alt"])
            assert sample is not None
            self._items.append({"sample": int(sample[1]), "title": given["title"], "src": given["src"]})

    def samples(self, name: str) -> list[int]:
        return [item["sample"] for item in self.lists[name]]


def page(source: Source, subsets: dict[str, np.ndarray], **fields: Any) -> str:
    held = {name: Subset(ids, None, None) for name, ids in subsets.items()}
    return render_score_page(ScorePageData(source, fields.pop("scored", None), subsets=held, **fields))


def test_dropped_samples_stand_beside_kept_ones(source: Source) -> None:
    ids = np.flatnonzero(np.arange(len(source.train)) % 3 == 0)
    found = Lists(page(source, {"third": ids}, sample_classes=4, samples_per_end=6))
    assert len(found.lists) == 4 * 2
    for name, items in found.lists.items():
        verb, label = re.fullmatch(r"(Kept|Dropped) samples of class (\d) in third", name).groups()  # type: ignore[union-attr]
        samples = [item["sample"] for item in items]
        assert len(set(samples)) == 6
        assert (source.train.labels[samples] == int(label)).all()
        assert (np.isin(samples, ids) == (verb == "Kept")).all()


def test_the_draw_is_seeded_and_shared_by_subsets() -> None:
    labels = np.arange(400) % 2
    half, quarter = np.arange(0, 400, 2) // 4 * 4, np.arange(0, 400, 8)
    kept, dropped = draw_samples(labels, quarter, 0, 100, 7)
    again = draw_samples(labels, quarter, 0, 100, 7)
    assert kept.tolist() == again[0].tolist()
    assert draw_samples(labels, quarter, 0, 100, 8)[0].tolist() != kept.tolist()
    assert sorted(kept) == [i for i in quarter if labels[i] == 0]
    assert len(kept) + len(dropped) >= 150
    in_half = draw_samples(labels, half, 0, 100, 7)[0].tolist()
    assert [i for i in in_half if i in set(quarter)] == [i for i in kept if i in set(half)]
    firsts = {int(draw_samples(labels, quarter, 0, 1, seed)[0][0]) for seed in range(40)}
    assert len(firsts) > 15, "the draw is not the first samples of a class"


def test_a_class_without_kept_or_dropped_samples_says_so(source: Source) -> None:
    ids = np.flatnonzero(source.train.labels == 3)
    html = page(source, {"threes": ids}, sample_classes=10)
    found = Lists(html)
    assert "Kept samples of class 0 in threes" not in found.lists
    assert "Dropped samples of class 3 in threes" not in found.lists
    text = re.sub(r"<[^>]+>", "", html)
    assert f"Kept: {len(ids):,} of {len(ids):,}" in text
    assert f"Dropped: 0 of {len(ids):,}" in text


def test_samples_have_the_names_of_their_files(folder: Path) -> None:
    source = open_source(str(folder))
    scored = ScoreFile(np.arange(8.0), "mine", source.fingerprint)
    html = page(source, {"some": np.array([0, 1, 5])}, scored=scored)
    found = Lists(html)
    names = [f"train/{name}/{name[:3]}-{number}.png" for name in ("cat", "dog <b>") for number in range(4)]
    shown = [item for items in found.lists.values() for item in items]
    assert len(shown) == 2 * 8 + 8
    for item in shown:
        assert item["path"] == names[item["sample"]]
        assert item["title"].endswith(f", {names[item['sample']]}")
    assert "dog <b>" not in html, "names are escaped"
    assert "its score and its file" in html


def test_samples_that_are_no_files_have_no_names(source: Source) -> None:
    assert 'class="file"' not in page(source, {"a": np.arange(50)})


def test_a_page_about_subsets_alone(source: Source) -> None:
    html = page(source, {"a": np.arange(0, 200), "b": np.arange(100, 500)}, sample_classes=2)
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.S)
    for present in ("Subsets of digits", "Kept and dropped samples", "Class balance", "Overlap", "Provenance"):
        assert present in text
    for absent in ("Scores by class", "Median score", "Highest and lowest", "Scoring time", "Spearman", "its score"):
        assert absent not in text
    assert "50%" in text, "half of a is in b"
    assert "25%" in text
    assert html.count("<details open>") == 1, "the first of several subsets"


def outlines(markup: str) -> dict[str, list[tuple[float, float]]]:
    """Return the height of each outline by its class, as (left edge, height), from the path alone."""
    found = {}
    for path, kind in re.findall(r'<path d="([^"]*)" class="trend (c\d)"/>', markup):
        x, steps = 0.0, []
        y = 0.0
        for command, numbers in re.findall(r"([MVH])([\d. ]+)", path):
            values = [float(number) for number in numbers.split()]
            if command == "M":
                x, y = values
            elif command == "V":
                y = values[0]
            else:
                steps.append((x, y))
                x = values[0]
        found[kind] = steps
    return found


def test_several_subsets_are_outlines_in_one_histogram() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=1000)
    subsets = [np.flatnonzero(scores > 0.5), np.arange(0, 1000, 2), np.flatnonzero(abs(scores) > 1)]
    bins = Bins.of(scores)
    markup = histogram(bins.count(scores), [bins.count(scores[ids]) for ids in subsets], bins, "h")
    drawn = outlines(markup)
    assert list(drawn) == ["c1", "c2", "c3"]
    assert 'class="kept"' not in markup
    tops = [float(y) for y in re.findall(r'<rect[^>]* y="([\d.]+)"', markup)]
    unit = (220.0 - min(tops)) / bins.count(scores).max()  # the axis is at 220
    for kind, ids in zip(drawn, subsets, strict=True):
        clipped = np.clip(scores[ids], bins.edges[0], bins.edges[-1])
        expected = np.histogram(clipped, bins.edges)[0]
        width = (760 - 56 - 20) / len(expected)
        assert len(drawn[kind]) == np.count_nonzero(expected), "empty bins have no line"
        for x, y in drawn[kind]:
            assert (220 - y) / unit == pytest.approx(expected[round((x - 56) / width)], abs=0.2)


def test_one_subset_stays_the_filled_part_of_the_bars() -> None:
    scores = np.linspace(0, 1, 100)
    bins = Bins.of(scores)
    markup = histogram(bins.count(scores), [bins.count(scores[:50])], bins, "h")
    assert markup.count('class="kept"') == np.count_nonzero(bins.count(scores[:50]))
    assert "trend" not in markup


def test_pages_about_scores_without_subsets_have_no_gallery(source: Source) -> None:
    scored = ScoreFile(np.arange(float(len(source.train))), "mine", source.fingerprint)
    assert "Kept and dropped" not in render_score_page(ScorePageData(source, scored))


def test_reads_subsets_without_scores(source: Source, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(40))
    data = read_score_page_data(source, None, subsets=[tmp_path / "a.npy"], seed=5)
    assert data.scored is None
    assert data.score_files == {}
    assert "seed 5" in render_score_page(data)
    moved = dataclasses.replace(data, seed=6)
    assert Lists(render_score_page(moved)).lists != Lists(render_score_page(data)).lists
