"""The page and the picture of the theorem: what the formulas and the simulation show, and where the theorem fails."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdfast.files import check_writable
from kdfast.progress import Progress
from kdfast.report.markup import Safe, render, statistics_list, table, tag
from kdfast.report.page import check_page_path, render_page, write_page
from kdfast.reproduction.report.picture import check_picture_path, draw_picture, write_picture
from kdfast.reproduction.theorem.regression import (
    ALPHAS,
    SAMPLES_PER_FEATURE,
    TEACHER_FRACTIONS,
    Alignment,
    Point,
    Problem,
    agreement,
    counterexample,
    curves,
    measure_alignment,
)
from kdfast.sweep.charts import Axis, Line, Mark, chart, legend, line_sample

PAGE, PICTURE = "report.html", "plot.svg"

_EXTRA = 10  # samples that the teacher of the counterexample gets in addition
_STATEMENT = (
    "A teacher is a ridge regression on a share f_t of the samples. A student is one on a share f, a part of the "
    "teacher's samples, and its targets are alpha times the teacher's predictions plus 1 - alpha times the labels. "
    "Theorem 3.1 of Ben-Baruch et al. says that the bias of the student falls as f_t grows. The proof takes the "
    "eigenvectors of the two Gram matrices as equal."
)
_LIMITS = (
    "The theorem compares teachers with each other. It does not say that a student with a teacher has less bias than "
    "one without: where the eigenvectors agree, alpha = 0 has the least bias for every f_t, because the teacher's "
    "shrinkage adds to the student's. What a teacher lowers is the variance, on which the theorem is silent.",
    "It is about linear models, squared loss, and a student that uses a part of the teacher's samples.",
    "The text of the proof was not at hand; the closed forms on this page were derived anew and agree with fitted "
    "regressions.",
)


@dataclass(frozen=True)
class Findings:
    """Everything that the page shows."""

    problem: Problem
    seed: int
    points: list[Point]
    alignments: list[Alignment]
    rising: list[float]


def reproduce_theorem(
    out: Path, *, problem: Problem | None = None, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Check the theorem by formula and by simulation, and write report.html and plot.svg.

    Args:
        out: The folder to write to; created if missing.
        problem: The regression problem; default: that of `Problem`.
        seed: Seed of samples, weights and noise.
        progress: Called with (parts done, parts, status).

    Returns:
        The findings as JSON values.

    Raises:
        OutputError: The files cannot be written, or would replace some that kdfast did not write.
    """
    check_theorem_files(out)
    check_writable(out)
    problem = problem or Problem()
    points = curves(problem, seed)
    alignments = []
    for number, size in enumerate(SAMPLES_PER_FEATURE, 1):
        if progress is not None:
            progress(number, len(SAMPLES_PER_FEATURE) + 1, f"{size:g} samples per feature")
        alignments.append(measure_alignment(problem, size, seed))
    findings = Findings(problem, seed, points, alignments, counterexample(_EXTRA))
    write_page(_render_page(findings), out / PAGE)
    lines = _bias_lines(points)
    title = f"Squared bias of a student on {problem.fraction:g} of the data (ridge regression)"
    entries = [(name, line_sample(line)) for name, line in lines]
    write_picture(draw_picture(title, _bias_chart(lines), entries), out / PICTURE)
    return _to_dict(findings)


def check_theorem_files(out: Path) -> None:
    """Check, before the work, that report.html and plot.svg may be written. Writes nothing.

    Raises:
        OutputError: One of them exists, and kdfast did not write it.
    """
    check_page_path(out / PAGE)
    check_picture_path(out / PICTURE)


def describe(result: dict[str, Any]) -> str:
    """Return the findings in a few lines of text."""
    first, last = ([p for p in result["points"] if p["alpha"] == 1][place]["bias"] for place in (0, -1))
    small = result["alignments"][0]
    gap = max(entry["largest"] for entry in result["agreement"].values())
    return (
        f"squared bias at alpha 1: {first:.4f} with a teacher on the student's samples, {last:.4f} with one on all "
        f"data; simulation within {gap:.1f} standard errors of the formulas\n"
        f"where eigenvectors differ, it can rise: with {small['samples_per_feature']:g} samples per feature, in "
        f"{100 * small['some_step']:.0f}% of the draws for some weights, and in the example with two features from "
        f"{result['counterexample'][0]:.3f} to {result['counterexample'][-1]:.3f}"
    )


def _to_dict(findings: Findings) -> dict[str, Any]:
    return {
        "seed": findings.seed,
        "problem": asdict(findings.problem),
        "points": [asdict(point) for point in findings.points],
        "agreement": agreement(findings.points),
        "alignments": [asdict(alignment) for alignment in findings.alignments],
        "counterexample": findings.rising,
    }


def _render_page(findings: Findings) -> str:
    problem = findings.problem
    statistics = statistics_list(
        [
            ("Samples", f"{problem.samples:,}"),
            ("Features", f"{problem.features:,}"),
            ("Student's share f", f"{problem.fraction:g}"),
            ("Draws of the noise", f"{problem.draws:,}"),
        ]
    )
    sections = [
        ("statement", "What the theorem says", tag("p", _STATEMENT)),
        ("bias", "Bias against the teacher's share", _bias_section(findings.points)),
        ("assumption", "Where the assumption holds, and where not", _assumption_section(findings)),
        ("counterexample", "An example in which the bias rises", _counterexample_section(findings.rising)),
        ("limits", "What this does not show", tag("ul", (tag("li", text) for text in _LIMITS))),
        ("provenance", "Settings", _settings(findings)),
    ]
    return render_page("Theorem 3.1: a student's bias and its teacher's data", statistics, sections)


def _bias_section(points: Sequence[Point]) -> Safe:
    lines = _bias_lines(points)
    errors = [
        (f"alpha {alpha:g}", Line(number, [_mark(p.teacher_fraction, p.bias + p.variance) for p in members]))
        for number, (alpha, members) in enumerate(_by_alpha(points))
    ]
    total = chart(
        [line for _, line in errors], [], Axis.of_values(TEACHER_FRACTIONS), "teacher's share f_t",
        "Squared bias plus variance against the teacher's share", value_name="squared bias + variance",
    )  # fmt: skip
    falls = all(
        after.bias < before.bias
        for alpha, members in _by_alpha(points)
        if alpha > 0
        for before, after in itertools.pairwise(members)
    )
    gaps = agreement(list(points))
    verdict = (
        f"With a teacher, the bias {'falls at every step' if falls else 'does not fall at every step'} of f_t. The "
        f"simulation lies within {gaps['bias']['largest']:.1f} standard errors of the formula for the bias and within "
        f"{gaps['variance']['largest']:.1f} of that for the variance (root mean square "
        f"{gaps['bias']['root_mean_square']:.1f} and {gaps['variance']['root_mean_square']:.1f}; the points share the "
        "noise). The right chart adds the variance: that is where a teacher helps."
    )
    rows = [
        [
            f"{p.alpha:g}", f"{p.teacher_fraction:g}", f"{p.bias:.5f}",
            f"{p.simulated_bias.mean:.5f} ± {p.simulated_bias.error:.5f}", f"{p.variance:.5f}",
            f"{p.simulated_variance.mean:.5f} ± {p.simulated_variance.error:.5f}",
        ]
        for p in points
    ]  # fmt: skip
    titles = ["alpha", "f_t", "squared bias", "simulated", "variance", "simulated"]
    numbers = table("Simulated: mean ± standard error.", titles, rows)
    return render(
        [
            tag("p", verdict),
            legend(lines, reference=False),
            tag("div", tag("figure", _bias_chart(lines)), tag("figure", total), class_="charts"),
            tag("details", tag("summary", "All numbers"), numbers),
        ]
    )


def _bias_lines(points: Sequence[Point]) -> list[tuple[str, Line]]:
    lines = []
    for number, (alpha, members) in enumerate(_by_alpha(points)):
        lines.append((f"alpha {alpha:g}", Line(number, [_mark(p.teacher_fraction, p.bias) for p in members])))
        simulated = [
            Mark(p.teacher_fraction, p.simulated_bias.mean, p.simulated_bias.error, 5.5, "simulated") for p in members
        ]
        lines.append((f"alpha {alpha:g}, simulated", Line(number, simulated, joined=False, hollow=True)))
    return lines


def _bias_chart(lines: Sequence[tuple[str, Line]]) -> Safe:
    hollow_first = sorted((line for _, line in lines), key=lambda line: not line.hollow)
    return chart(
        hollow_first, [], Axis.of_values(TEACHER_FRACTIONS), "teacher's share f_t",
        "Squared bias against the teacher's share", value_name="squared bias",
    )  # fmt: skip


def _assumption_section(findings: Findings) -> Safe:
    alignments = findings.alignments
    axis = Axis.of_values([a.samples_per_feature for a in alignments])
    angles = [
        ("two independent subsets", [a.independent for a in alignments]),
        ("subset and ten times as much data", [a.nested for a in alignments]),
    ]
    shares = [
        ("rises in a step, for some weights", [a.some_step for a in alignments]),
        ("rises from first to last, for some weights", [a.some_theta for a in alignments]),
        ("rises in a step, for random weights", [a.random_step for a in alignments]),
    ]
    x = [a.samples_per_feature for a in alignments]
    angle_lines = [
        (name, Line(number, [_mark(at, value[0]) for at, value in zip(x, values, strict=True)]))
        for number, (name, values) in enumerate(angles)
    ]
    share_lines = [
        (name, Line(number + len(angles), [_mark(at, 100 * value) for at, value in zip(x, values, strict=True)]))
        for number, (name, values) in enumerate(shares)
    ]
    pictures = [
        tag("div", legend(lines, reference=False), tag("figure", drawing))
        for lines, drawing in (
            (angle_lines, _share_chart(angle_lines, axis, "Angle between leading eigenvectors", "angle (degrees)")),
            (share_lines, _share_chart(share_lines, axis, "Draws in which the bias rises", "draws (%)")),
        )
    ]
    titles = ["samples per feature", "angle, independent", "angle, nested", *(name for name, _ in shares)]
    rows = [
        [
            f"{a.samples_per_feature:g}", _range(a.independent), _range(a.nested), f"{100 * a.some_step:.0f}%",
            f"{100 * a.some_theta:.0f}%", f"{100 * a.random_step:.0f}%",
        ]
        for a in alignments
    ]  # fmt: skip
    text = (
        f"Left: the largest angle between the {findings.problem.top} leading eigenvectors of two Gram matrices, the "
        f"mean of {findings.problem.subsets} draws. Right: the share of draws in which the bias rises (alpha 1) as the "
        "teacher's data grow from the student's subset to ten times as much in nine steps. Equal eigenvectors are "
        "sufficient, not necessary: with large angles the bias can still fall. But for subsets smaller than the number "
        "of features there are weights for which the largest set is a worse teacher than the student's own."
    )
    numbers = table("Angles in degrees: mean (smallest to largest).", titles, rows)
    details = tag("details", tag("summary", "All numbers"), numbers)
    return render([tag("p", text), tag("div", pictures, class_="charts"), details])


def _share_chart(lines: Sequence[tuple[str, Line]], axis: Axis, label: str, name: str) -> Safe:
    across = f"samples of the student per feature{', logarithmic' if axis.log else ''}"
    return chart([line for _, line in lines], [], axis, across, label, value_name=name)


def _counterexample_section(rising: Sequence[float]) -> Safe:
    line = Line(0, [_mark(count, value) for count, value in enumerate(rising)])
    drawing = chart(
        [line], [], Axis.of_values(range(len(rising))), "further samples of the teacher",
        "Squared bias against the teacher's further samples", value_name="squared bias",
    )  # fmt: skip
    text = (
        "Two features, ridge 1, alpha 1, true weights (1, -3). The student has the one sample (2, 0). Its teacher has "
        "this one and more and more samples (1, 1), which mix the two features, so that the eigenvectors differ. The "
        f"squared bias rises with every sample, from {rising[0]:.4f} to {rising[-1]:.4f}: by hand, "
        "9 + (1 - 16/25)² = 9.1296 without further samples and 9 + (1 - 24/55)² = 9.3177 with one."
    )
    return tag("div", tag("figure", drawing), tag("p", text), class_="charts")


def _settings(findings: Findings) -> Safe:
    problem = findings.problem
    rows: list[list[object]] = [
        ["seed", f"{findings.seed}"],
        ["features", "normal, the k-th with the standard deviation k^-1/2; the true weights have norm 1"],
        ["ridge", f"{problem.ridge:g} times the mean eigenvalue of the student's expected Gram matrix"],
        ["noise", f"normal, standard deviation {problem.noise:g}"],
        ["alpha", ", ".join(f"{alpha:g}" for alpha in ALPHAS)],
        ["precision", "float64"],
    ]
    return table("The regression problem", ["setting", "value"], rows, class_="provenance")


def _by_alpha(points: Sequence[Point]) -> list[tuple[float, list[Point]]]:
    return [(alpha, [p for p in points if p.alpha == alpha]) for alpha in ALPHAS]


def _mark(x: float, y: float) -> Mark:
    return Mark(x, y, 0.0, 3.5, f"{x:g}: {y:.4g}")


def _range(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.0f} ({values[1]:.0f} to {values[2]:.0f})"
