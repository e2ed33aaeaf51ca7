"""The page of a learned sampling policy: one self-contained HTML file, made from idx.json alone."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.errors import DataError
from kdfast.files import matches_seal, read_json, schemas
from kdfast.files.validate import check_type
from kdfast.pruning.if_beta.stages import mode_and_sharpness
from kdfast.report import charts
from kdfast.report.markup import Safe, render, statistics_list, table, tag
from kdfast.report.page import check_page_path, render_page, write_page

METHOD = "if-beta"
_CURVE_POINTS = 200
_PRUNE_AGAIN = "write it again with kdfast prune"
# The density of an extreme policy is cut off here, so that the rest stays visible.
_MAX_DENSITY = 12


def write_if_beta_page(provenance: Path, out: Path, *, replace: bool = True) -> int:
    """Write the page of a subset selected by IF-Beta.

    Args:
        provenance: idx.json, written beside the subset by `kdfast prune`.
        out: The .html file; its folder is created if missing.
        replace: Replace another page that kdfast wrote.

    Returns:
        Size of the page in bytes.

    Raises:
        UsageError: `out` does not end in .html.
        DataError: The file is missing, or is not the provenance of an IF-Beta subset.
        OutputError: The page cannot be written.
    """
    check_page_path(out)
    content = read_json(provenance)
    if not isinstance(content, dict) or content.get("method") != METHOD or METHOD not in content:
        raise DataError(
            f"{provenance} is not the provenance of a subset selected by {METHOD}: pass the .json file beside idx.npy"
        )
    check_type(content, schemas.IfBetaProvenance, provenance, advice=_PRUNE_AGAIN)
    _check_counts(content[METHOD], provenance)
    if not matches_seal(content):
        raise DataError(f"{provenance} was damaged or edited, it does not match its own digest: {_PRUNE_AGAIN}")
    return write_page(_render_page(content), out, replace=replace)


def _check_counts(record: dict[str, Any], provenance: Path) -> None:
    """Check what concerns several fields: as many counts as bins, and no more kept samples than samples.

    Raises:
        DataError: They contradict each other.
    """
    for name in ("ranks", "scores", "classes"):
        counts = record[name]
        sizes, kept = (np.array(counts[part], np.int64) for part in ("all", "kept"))
        edges = np.array(counts.get("edges", range(len(sizes) + 1)))
        fits = len(sizes) == len(kept) == len(edges) - 1 and bool((kept <= sizes).all() and (np.diff(edges) >= 0).all())
        if not fits or not kept.any():
            raise DataError(f"{provenance}: field {METHOD}.{name}: its counts contradict each other: {_PRUNE_AGAIN}")
    if len(record["path"]) != len(record["rewards"]) + 1:
        raise DataError(
            f"{provenance}: field {METHOD}.path: {len(record['path'])} points for {len(record['rewards'])} rewards: "
            f"{_PRUNE_AGAIN}"
        )


def _render_page(content: dict[str, Any]) -> str:
    record = content[METHOD]
    sections = [
        ("density", "Policy over the ranks", _render_density(record)),
        ("path", "Search", _render_path(record)),
        ("scores", "Scores of the kept samples", _render_scores(record)),
        ("balance", "Class balance", _render_balance(record)),
        ("ends", "Kept samples of highest and lowest score", _render_extremes(record)),
        ("cost", "Cost", _render_cost(record)),
    ]
    title = f"IF-Beta, {content['parameters']['fraction']:g} of the data, seed {content['seed']}"
    return render_page(title, _render_statistics(record), sections)


def _render_statistics(record: dict[str, Any]) -> Safe:
    gain = record["gain"]
    better = "yes" if gain["difference"] > gain["half_width"] else "no"
    if [record["a"], record["b"]] != record["learned"]:
        better += "; the uniform policy was used"
    return statistics_list(
        [
            ("Preset", record.get("preset", "kdfast")),
            ("a, b", f"{record['a']:.2f}, {record['b']:.2f}"),
            *_mode_and_sharpness(record),
            ("Better than uniform on the proxies", better),
            ("Reward minus that of uniform", f"{gain['difference']:+.4f} ± {gain['half_width']:.4f}"),
            ("Held-out accuracy of the proxies", f"{gain['accuracy']:.2%} (uniform {gain['baseline_accuracy']:.2%})"),
            ("Proxies trained", f"{record['trials']:,}"),
            ("Cost relative to one distillation", f"{record['percent_of_distillation']:.2g}%"),
        ]
    )


def _mode_and_sharpness(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the statistic of the two numbers that the preset `paper` searches; nothing for other presets."""
    a, b = record["learned"]
    if record.get("preset") != "paper" or a + b <= 2:
        return []
    mu, tau = mode_and_sharpness(a, b)
    return [("Mode mu, sharpness tau (mu = 0: the hardest samples)", f"{mu:.2f}, {tau:.2f}")]


def _render_density(record: dict[str, Any]) -> Safe:
    u = (np.arange(_CURVE_POINTS) + 0.5) / _CURVE_POINTS
    lines = {}
    for name, (a, b) in {"learned": record["learned"], "uniform": (1.0, 1.0)}.items():
        log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + (a - 1) * np.log(u) + (b - 1) * np.log1p(-u)
        lines[name] = np.minimum(np.exp(log), _MAX_DENSITY)
    density = charts.line_chart(u, lines, "rank u of the score (0 easiest, 1 hardest)", "Beta density over the ranks")
    edges = np.array(record["ranks"]["edges"])
    names = [f"ranks {low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
    shares = _render_shares(record["ranks"], names, "Share of the samples kept, by rank")
    note = (
        "Above: the density that weights the draw. Below: the share of the samples kept, by rank; the dashed line is "
        "the share of all samples."
    )
    return render([tag("p", note, class_="note"), tag("figure", density), shares])


def _render_path(record: dict[str, Any]) -> Safe:
    a, b = np.array(record["path"]).T
    steps = np.arange(len(a), dtype=float)
    path = charts.line_chart(steps, {"a": a, "b": b}, "step", "a and b at each step")
    rewards = {"reward": np.array(record["rewards"])}
    label = "Mean reward of the proxies at each step"
    reward = charts.line_chart(steps[: len(record["rewards"])], rewards, "step", label, from_zero=False)
    return render([tag("figure", path), tag("figure", reward)])


def _render_scores(record: dict[str, Any]) -> Safe:
    bins = charts.Bins(np.array(record["scores"]["edges"]), log=False)
    all_counts, kept = (np.array(record["scores"][name], np.int64) for name in ("all", "kept"))
    return tag("figure", charts.histogram(all_counts, [kept], bins, "Scores of all and of the kept samples"))


def _render_balance(record: dict[str, Any]) -> Safe:
    names = [f"class {c}" for c in range(len(record["classes"]["all"]))]
    return _render_shares(record["classes"], names, "Share kept of each class")


def _render_shares(counts: dict[str, Any], names: list[str], label: str) -> Safe:
    """Render the kept share of each group, with the share of all samples as a dashed line."""
    sizes, kept = (np.array(counts[name], np.int64) for name in ("all", "kept"))
    shares = (kept / np.maximum(sizes, 1)).tolist()
    titles = [
        f"{name}: {k} of {n} kept ({share:.1%})" for name, k, n, share in zip(names, kept, sizes, shares, strict=True)
    ]
    return tag("figure", charts.column_chart(shares, titles, (), float(kept.sum() / sizes.sum()), label))


def _render_extremes(record: dict[str, Any]) -> Safe:
    def rows(name: str) -> list[list[str]]:
        return [[str(r["id"]), str(r["label"]), f"{r['score']:.4g}", f"{r['u']:.4f}"] for r in record["ends"][name]]

    titles = ["sample", "class", "score", "rank u"]
    tables = (table(f"{name.capitalize()} scores", titles, rows(name)) for name in ("highest", "lowest"))
    return tag("div", tables, class_="side")


def _render_cost(record: dict[str, Any]) -> Safe:
    distillation = record["distillation"]
    student, epochs = distillation["student"], distillation["epochs"]
    rows = [
        ["Scores", f"{record['score_seconds']:.1f}"],
        ["Search", f"{record['search_seconds']:.1f}"],
        [f"One distillation of {student}, {epochs} epochs (estimated)", f"{distillation['seconds']:.0f}"],
    ]
    if record.get("flatten_seconds"):
        rows.insert(0, ["Flattening of the teacher", f"{record['flatten_seconds']:.1f}"])
    caption = f"All steps take {record['percent_of_distillation']:.2g}% of the time of one distillation"
    epoch, epochs_of_data = record.get("epoch"), record.get("epochs")
    if epoch is not None and epochs_of_data is not None:
        rows.append([f"One epoch of training {epoch['network']} on all data (estimated)", f"{epoch['seconds']:.0f}"])
        caption += f", or that of {epochs_of_data:.2g} epochs of training the teacher's network on all data"
    return table(caption, ["", "seconds"], rows)
