"""The page about scores, or about subsets alone: one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path

from kdfast.report.page import check_page_path, render_page, write_page
from kdfast.report.score_data import ScorePageData
from kdfast.report.score_sections import SECTIONS, render_statistics


def render_score_page(data: ScorePageData) -> str:
    """Return the HTML of the page."""
    about = "Subsets" if data.scored is None else f"{data.scored.method} scores"
    title = f"{about} of {Path(data.source.path).name}"
    sections = [(anchor, heading, render(data)) for anchor, (heading, render) in SECTIONS.items()]
    return render_page(title, render_statistics(data), sections)


def write_score_page(data: ScorePageData, out: Path, *, replace: bool = True) -> int:
    """Write the page atomically.

    Args:
        data: Content of the page.
        out: The .html file; its folder is created if missing.
        replace: Replace another page that kdfast wrote.

    Returns:
        Size of the page in bytes.

    Raises:
        UsageError: `out` does not end in .html.
        OutputError: The file cannot be written.
    """
    check_page_path(out)
    return write_page(render_score_page(data), out, replace=replace)
