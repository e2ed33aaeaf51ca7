"""The score page: content, self-containment, accessibility, and escaping of names."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source
from kdfast.data.subset import Subset, write_subset
from kdfast.errors import DataError, OutputError, SubsetError, UsageError
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.score_file import ScoreFile, write_scores
from kdfast.report.charts import Bins
from kdfast.report.markup import Safe, render, tag
from kdfast.report.score_data import ScorePageData, read_score_page_data
from kdfast.report.score_page import render_score_page, write_score_page
from kdfast.report.score_statistics import classes_by_mean_score, compute_overlaps, extreme_samples, rank_correlations


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("digits")


def scored(source: Source, method: str = "el2n", seed: int = 0) -> ScoreFile:
    values = np.random.default_rng(seed).gamma(1.0, size=len(source.train)) + source.train.labels
    return ScoreFile(values, method, source.fingerprint, parameters={"epoch": 20, "seed": seed}, seconds=1.5)


@pytest.fixture
def files(source: Source, tmp_path: Path) -> dict[str, Path]:
    first, second = scored(source), scored(source, "grand", 1)
    write_scores(tmp_path / "el2n.npz", first)
    write_scores(tmp_path / "grand.npz", second)
    ids = select_subset(first.scores, source.train.labels, 0.1).ids
    write_subset(tmp_path / "hard.npy", ids, {"data": source.fingerprint, "method": "el2n"})
    np.save(tmp_path / "own.npy", np.arange(100))
    return {name: tmp_path / name for name in ("el2n.npz", "grand.npz", "hard.npy", "own.npy")}


class Reader(HTMLParser):
    """Collects elements and fails on malformed markup."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, name, attributes) -> None:
        self.seen.append((name, dict(attributes)))
        if name not in ("meta", "img", "br"):
            self.open.append(name)

    def handle_startendtag(self, name, attributes) -> None:
        self.seen.append((name, dict(attributes)))

    def handle_endtag(self, name) -> None:
        assert self.open.pop() == name

    def handle_data(self, data) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def html(source: Source, files: dict[str, Path]) -> str:
    subsets = [files["hard.npy"], files["own.npy"]]
    data = read_score_page_data(
        source, files["el2n.npz"], others=[files["grand.npz"]], subsets=subsets, sample_classes=3
    )
    return render_score_page(data)


def test_page_has_all_sections_images_and_charts(html: str, source: Source) -> None:
    page = read(html)
    titles = [
        "Scores by class",
        "Highest and lowest samples",
        "Kept and dropped samples",
        "Class balance",
        "Overlap between methods",
        "Provenance",
    ]
    assert all(title in page.text for title in titles)
    images = [attributes for name, attributes in page.seen if name == "img"]
    labels = source.train.labels
    shown = classes_by_mean_score(scored(source).scores, labels, 3)
    few = [min(10, int((labels[:100] == label).sum())) for label in shown]
    assert len(images) == 3 * 2 * 10 * 2 + 3 * 10 + sum(few), "ends of classes; kept and dropped of two subsets"
    charts = [attributes["aria-label"] for name, attributes in page.seen if name == "svg"]
    assert len(charts) == 1 + len(source.classes) + 2
    assert sum("Histogram" in text for text in charts) == 1
    assert source.fingerprint in page.text
    assert "epoch: 20" in page.text
    assert "no idx.json beside it" in page.text
    assert "144 (10.0%)" in page.text


def test_page_needs_no_other_resource(html: str) -> None:
    page = read(html)
    for name, attributes in page.seen:
        assert name not in ("script", "link", "iframe", "object", "embed", "base")
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "srcset", "action"):
            assert re.match(r"data:image/png;base64,|#", attributes.get(key) or "#")
    assert "url(" not in html
    assert "@import" not in html
    policy = next(a for n, a in page.seen if n == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_page_is_accessible(html: str) -> None:
    page = read(html)
    names = [name for name, _ in page.seen]
    assert next(attributes for name, attributes in page.seen if name == "html")["lang"] == "en"
    assert names.count("h1") == names.count("main") == names.count("header") == 1
    assert all(attributes.get("alt") for name, attributes in page.seen if name == "img")
    assert all(
        attributes.get("role") == "img" and attributes.get("aria-label") for n, attributes in page.seen if n == "svg"
    )
    assert all(attributes.get("scope") in ("row", "col") for name, attributes in page.seen if name == "th")
    assert names.count("table") == names.count("caption")
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for name, attributes in page.seen if name == "a"]
    assert {link.removeprefix("#") for link in links} <= set(ids)


EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'


def test_names_of_classes_methods_and_files_are_escaped(source: Source) -> None:
    evil = dataclasses.replace(source, classes=tuple(f"{EVIL}{i}" for i in range(10)), path=EVIL)
    subset = Subset(np.arange(50), {"data": "x", EVIL: EVIL}, None)
    scores = dataclasses.replace(scored(source), method=EVIL)
    html = render_score_page(ScorePageData(evil, scores, {EVIL + "2": scored(source)}, {EVIL: subset}))
    reader = read(html)
    assert "<script" not in html
    assert "onerror=alert(2)>" not in html
    assert all(name != "script" for name, _ in reader.seen)
    assert all("onerror" not in attributes for _, attributes in reader.seen)
    assert EVIL in reader.text


def test_text_is_escaped_and_markup_is_not() -> None:
    assert render(["a<b", Safe("<br/>"), None, 3]) == "a&lt;b<br/>3"
    assert tag("p", "x", class_='"', hidden=True, title=None) == '<p class="&quot;" hidden>x</p>'


def test_page_shows_the_teachers_predictions(source: Source) -> None:
    n = len(source.train)

    class Cache:
        coverage = np.arange(0, n, 2)
        manifest = {"teacher": {"net": "resnet8"}, "train_top1": 12.5}  # noqa: RUF012

        def identity_logits(self):
            logits = np.zeros((len(self.coverage), 10), np.float32)
            logits[:, 7] = 2.0
            return logits

    data = ScorePageData(source, scored(source), cache=Cache(), sample_classes=10)  # type: ignore[arg-type]
    reader = read(render_score_page(data))
    probability = f"{np.exp(2) / (9 + np.exp(2)):.0%}"
    assert f"✓ 7 {probability}" in reader.text
    assert f"✗ 7 {probability}" in reader.text
    framed = sum(attributes.get("class") == "differs" for name, attributes in reader.seen if name == "li")
    assert 0 < framed < 200, "uncovered samples have no predictions; covered ones of other classes differ"
    assert "12.50%" in reader.text


def test_classes_span_the_ranking_by_mean_score() -> None:
    labels = np.repeat(np.arange(5), 4)
    scores = np.array([3.0, 1.0, 5.0, 2.0, 4.0])[labels]
    assert classes_by_mean_score(scores, labels, 3) == [2, 0, 1]
    assert classes_by_mean_score(scores, labels, 9) == [2, 4, 0, 3, 1]


def test_extreme_samples_of_a_class() -> None:
    scores, labels = np.arange(20.0), np.arange(20) % 2
    highest, lowest = extreme_samples(scores, labels, 1, 3)
    assert highest.tolist() == [19, 17, 15]
    assert lowest.tolist() == [1, 3, 5]
    assert extreme_samples(scores, labels, 1, 50)[0].tolist() == list(range(19, 0, -2))


def test_rank_correlations_and_overlaps() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=100), rng.integers(0, 5, 100).astype(float)
    assert rank_correlations({"a": a, "b": b})[0, 1] == pytest.approx(spearmanr(a, b).statistic)
    assert compute_overlaps({"a": np.array([1, 2, 3, 4]), "b": np.array([3, 4])}).tolist() == [[1, 0.5], [1, 1]]


def test_bins_count_every_sample_and_are_logarithmic_for_a_long_tail() -> None:
    rng = np.random.default_rng(0)
    for values, log in ((rng.normal(size=999), False), (10 ** rng.normal(-5, 3, 999), True), (np.full(9, 2.0), False)):
        bins = Bins.of(values)
        assert bins.log is log
        assert bins.count(values).sum() == len(values)
        assert (np.diff(bins.edges) > 0).all()
    values = 10 ** rng.normal(-5, 3, 999)
    values[:2] = -1, 0  # fewer than the 0.5% below the first edge
    bins = Bins.of(values)
    assert bins.log
    with np.errstate(all="raise"):
        assert bins.count(values).sum() == len(values)


def test_rejects_files_of_other_data(source: Source, files: dict[str, Path], tmp_path: Path) -> None:
    other = dataclasses.replace(scored(source), data="0" * 64)
    write_scores(tmp_path / "other.npz", other)
    with pytest.raises(DataError, match="other data"):
        read_score_page_data(source, tmp_path / "other.npz")
    with pytest.raises(DataError, match="other data"):
        read_score_page_data(source, files["el2n.npz"], others=[tmp_path / "other.npz"])
    np.save(tmp_path / "far.npy", np.array([10**6]))
    with pytest.raises(SubsetError, match="past the end"):
        read_score_page_data(source, files["el2n.npz"], subsets=[tmp_path / "far.npy"])


def test_equal_names_become_distinct(source: Source, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_scores(tmp_path / "b" / "el2n.npz", scored(source, seed=2))
    data = read_score_page_data(source, files["el2n.npz"], others=[tmp_path / "b" / "el2n.npz", files["el2n.npz"]])
    assert list(data.others) == ["el2n (el2n)", "el2n (el2n, 2)"]


def test_rejects_a_path_that_cannot_be_written(source: Source, tmp_path: Path) -> None:
    data = ScorePageData(source, scored(source))
    with pytest.raises(UsageError, match=r"not an \.html file"):
        write_score_page(data, tmp_path / "page.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_score_page(data, tmp_path / "file" / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
