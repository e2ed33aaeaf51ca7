"""Charts as inline SVG, colored by the page's style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdfast.report.markup import Safe, tag

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# The axis is logarithmic if the largest value exceeds the median by more than this factor.
_LOG_FACTOR = 50
# On narrow screens, charts wider than this scroll instead of shrinking their text.
_NARROW_WIDTH = 400
# Colors of the lines of a chart: the first in the accent color, the second dashed in the color of the text.
_STROKES = ("stroke: var(--kept)", "stroke: var(--ink); stroke-dasharray: 5 4")


@dataclass(frozen=True)
class Bins:
    """Histogram bins of scores.

    Attributes:
        edges: float64 (count + 1,), ascending; powers of ten if `log`.
        log: Whether the axis is logarithmic.
    """

    edges: Floats
    log: bool

    @classmethod
    def of(cls, values: Floats, count: int = 40) -> Bins:
        """Make equal bins from the 0.5th to the 99.5th percentile, so that a long tail does not flatten the rest.

        The axis is logarithmic if nearly all values are positive and most are small compared with the largest.
        """
        low, middle, high = np.percentile(values, (0.5, 50, 99.5))
        log = bool(low > 0 and high > _LOG_FACTOR * middle)
        if log:
            low, high = np.log10(low), np.log10(high)
        if not low < high:
            low, high = float(values.min()), float(values.max())
        if not low < high:
            low, high = low - 0.5, high + 0.5
        return cls(np.linspace(low, high, count + 1), log)

    def count(self, values: Floats) -> Counts:
        """Return the number of values per bin, int64 (count,); the outer bins include the values beyond them."""
        # Below the first edge, values may be negative.
        placed = np.log10(np.maximum(values, 10 ** self.edges[0])) if self.log else values
        return np.histogram(np.clip(placed, self.edges[0], self.edges[-1]), self.edges)[0].astype(np.int64)

    def ticks(self) -> list[tuple[float, str]]:
        """Return positions on the axis, from 0 to 1, and their labels."""
        positions = np.linspace(0, 1, 6)
        values = self.edges[0] + positions * (self.edges[-1] - self.edges[0])
        return [(float(x), f"{10**v if self.log else v:.2g}") for x, v in zip(positions, values, strict=True)]


def histogram(all_counts: Counts, kept_counts: Sequence[Counts], bins: Bins, label: str) -> Safe:
    """Draw a large histogram with axes.

    Args:
        all_counts: Samples in each bin.
        kept_counts: Those that each subset keeps: of one subset the part of each bar in the accent color, of several
            an outline each.
        bins: The bins.
        label: Description of the chart for screen readers.
    """
    width, height, left, bottom = 760, 260, 56, 40
    top = max(1, int(all_counts.max()))
    plot_width, plot_height = width - left - 20, height - bottom - 12
    grid: list[Safe] = []
    for value in _ticks(top):
        y = 12 + plot_height * (1 - value / top)
        grid.append(tag("line", x1=left, x2=width - 20, y1=_format(y), y2=_format(y), class_="grid"))
        grid.append(tag("text", f"{value:,}", x=left - 8, y=_format(y + 4), class_="tick end"))
    for position, text in bins.ticks():
        # The last label ends at the edge of the chart, which may cut it off otherwise.
        x, anchor = (left + plot_width * position, "middle") if position < 1 else (width, "end")
        grid.append(tag("text", text, x=_format(x), y=height - bottom + 18, class_=f"tick {anchor}"))
    name = f"score (higher = harder){', logarithmic' if bins.log else ''}"
    axis = tag("text", name, x=left + plot_width / 2, y=height - 4, class_="axis middle")
    bars = _bars(all_counts, kept_counts, (left, 12, plot_width, plot_height), top)
    return tag("div", _svg(width, height, label, grid, bars, axis), class_="fits")


def small_histogram(all_counts: Counts, kept_counts: Sequence[Counts], label: str) -> Safe:
    """Draw a histogram without axes; arguments as for `histogram`."""
    return _svg(160, 52, label, _bars(all_counts, kept_counts, (0, 2, 160, 50), max(1, int(all_counts.max()))))


def column_chart(
    shares: Sequence[float], titles: Sequence[str], names: Sequence[str], level: float, label: str
) -> Safe:
    """Draw one column per share.

    Args:
        shares: Heights of the columns.
        titles: Tooltip of each column.
        names: Names below the columns; empty for none.
        level: Height of a dashed reference line.
        label: Description of the chart for screen readers.
    """
    width, height, left, bottom = 760, 150, 56, 26 if names else 12
    top = max(*shares, level, 1e-12) * 1.05
    plot_width, plot_height = width - left - 12, height - bottom - 8
    step = plot_width / len(shares)
    columns = [
        tag("text", name, x=_format(left + (place + 0.43) * step), y=height - 8, class_="tick middle")
        for place, name in enumerate(names)
    ]
    for place, (share, title) in enumerate(zip(shares, titles, strict=True)):
        column_height = plot_height * share / top
        corner = {"x": _format(left + place * step), "y": _format(8 + plot_height - column_height)}
        size = {"width": _format(max(step * 0.86, 0.5)), "height": _format(column_height)}
        columns.append(tag("g", tag("title", title), tag("rect", **corner, **size, class_="kept")))
    y = 8 + plot_height * (1 - level / top)
    line = tag("line", x1=left, x2=width - 12, y1=_format(y), y2=_format(y), class_="reference")
    ticks = [tag("text", f"{level:.1%}", x=left - 8, y=_format(y + 4), class_="tick end")]
    if y < height - bottom - 24:
        ticks.append(tag("text", "0", x=left - 8, y=height - bottom + 4, class_="tick end"))
    return _svg(width, height, label, columns, line, ticks)


def line_chart(x: Floats, lines: Mapping[str, Floats], axis: str, label: str, *, from_zero: bool = True) -> Safe:
    """Draw up to two lines over one axis.

    Args:
        x: float64 (n,), ascending.
        lines: Values (n,), finite, by name of the line.
        axis: Name of the horizontal axis.
        label: Description of the chart for screen readers.
        from_zero: Whether the vertical axis starts at zero.
    """
    width, height, left, right, above, bottom = 760, 220, 64, 20, 26, 40
    values = np.concatenate(list(lines.values()))
    low, high = (0.0 if from_zero else float(values.min())), float(values.max())
    high = high if high > low else low + 1
    last = float(x[-1]) if x[-1] > x[0] else float(x[0]) + 1

    def place(xs: Floats, ys: Floats) -> tuple[Floats, Floats]:
        across = left + (width - left - right) * (xs - x[0]) / (last - x[0])
        return across, above + (height - above - bottom) * (high - ys) / (high - low)

    marks = [tag("text", axis, x=(width + left) / 2, y=height - 4, class_="axis middle")]
    for value in np.linspace(low, high, 5):
        y = float(place(x[:1], np.array([value]))[1][0])
        marks.append(tag("line", x1=left, x2=width - right, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        marks.append(tag("text", f"{value:.3g}", x=left - 8, y=f"{y + 4:.1f}", class_="tick end"))
    for value in np.linspace(x[0], last, 6):
        tick = float(place(np.array([value]), np.array([low]))[0][0])
        marks.append(tag("text", f"{value:.3g}", x=f"{tick:.1f}", y=height - bottom + 18, class_="tick middle"))
    for number, (name, ys) in enumerate(lines.items()):
        points = zip(*place(x, ys), strict=True)
        path = "M" + " L".join(f"{across:.1f} {down:.1f}" for across, down in points)
        style = f"fill: none; stroke-width: 2; {_STROKES[number]}"
        marks.append(tag("path", d=path, style=style))
        start = left + 10 + 130 * number
        marks.append(tag("line", x1=start, x2=start + 24, y1=12, y2=12, style=style))
        marks.append(tag("text", name, x=start + 30, y=16, class_="tick"))
    return _svg(width, height, label, marks)


def outline(number: int) -> str:
    """Return the class in the style sheet that colors the outline of the subset with this number, counted from 1."""
    return f"c{(number - 1) % 9 + 1}"


def _bars(
    all_counts: Counts, kept_counts: Sequence[Counts], box: tuple[float, float, float, float], top: int
) -> list[Safe]:
    left, above, width, height = box
    step = width / len(all_counts)
    layers = [("all", all_counts)] + ([("kept", kept_counts[0])] if len(kept_counts) == 1 else [])
    bars = []
    for kind, counts in layers:
        for place, count in enumerate(counts):
            if count:
                bar_height = max(height * int(count) / top, 0.6)
                corner = {"x": _format(left + place * step), "y": _format(above + height - bar_height)}
                bars.append(tag("rect", **corner, width=_format(step * 0.9), height=_format(bar_height), class_=kind))
    if len(kept_counts) > 1:
        for number, counts in enumerate(kept_counts, 1):
            steps, drawn = [], False
            for place, count in enumerate(counts):
                x, y = left + place * step, above + height * (1 - int(count) / top)
                if count and not drawn:
                    steps.append(f"M{x:.1f} {above + height:g}")
                if count or drawn:
                    steps.append(f"V{y:.1f}" + (f" H{x + step:.1f}" if count else ""))
                drawn = bool(count)
            end = f"V{above + height:g}" if drawn else ""
            bars.append(tag("path", d=" ".join([*steps, end]), class_=f"trend {outline(number)}"))
    return bars


def _svg(width: float, height: float, label: str, *children: object) -> Safe:
    wide = "wide" if width > _NARROW_WIDTH else None
    return tag("svg", *children, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, class_=wide)


def _ticks(top: int) -> list[int]:
    """Return about four round numbers from 0 to `top`."""
    for step in (factor * 10**power for power in range(12) for factor in (1, 2, 5)):
        if step * 5 > top:
            return list(range(0, top + 1, step))
    return [0]


def _format(number: float) -> str:
    return f"{number:.4g}" if abs(number) < 1000 else f"{number:.0f}"
