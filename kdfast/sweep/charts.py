"""Charts of accuracy as inline SVG: lines of marks over one axis, and intervals of differences."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdfast.report.markup import Safe, render, tag
from kdfast.sweep.summary import Difference

COLORS = 10  # in the style sheet, as the classes c0 to c9

_WIDTH, _HEIGHT = 440, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 30, 44
_SHAPES = (
    "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1 -1 0Z",  # circle
    "M-.9 -.9H.9V.9H-.9Z",  # square
    "M0 -1.2L1.1 .8H-1.1Z",  # triangle
    "M0 -1.3L1.3 0L0 1.3L-1.3 0Z",  # diamond
    "M0 1.2L1.1 -.8H-1.1Z",  # triangle, pointing down
)
_ARROWS = ("M-1.2 0L1 -1.1V1.1Z", "M1.2 0L-1 -1.1V1.1Z")  # to the left, to the right
_STAR = "M0 -1.5L.45 -.45L1.5 0L.45 .45L0 1.5L-.45 .45L-1.5 0L-.45 -.45Z"
_LOG_FACTOR = 6  # an axis is logarithmic if its largest value exceeds the smallest by more than this factor
_LABEL_GAP = 14  # least distance of two labels, in units of the chart
_MAX_SHIFT = 34  # marks of one fraction are spread over at most this width
_INTERVAL_WIDTH, _INTERVAL_HEIGHT = 240, 18


@dataclass(frozen=True)
class Mark:
    """A point of a chart.

    Attributes:
        x: Its value on the horizontal axis.
        y: Its value on the vertical axis.
        spread: Half the length of its vertical bar; 0 for none.
        radius: Its size.
        title: Its tooltip.
    """

    x: float
    y: float
    spread: float
    radius: float
    title: str


@dataclass(frozen=True)
class Line:
    """The marks of one method.

    Attributes:
        number: Chooses color and shape.
        marks: The marks, in the order in which they are joined.
        joined: Whether a line joins them.
        dashed: Whether this line is dashed.
        hollow: Whether the marks are hollow.
    """

    number: int
    marks: Sequence[Mark] = ()
    joined: bool = True
    dashed: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Reference:
    """A horizontal line.

    Attributes:
        y: Its value on the vertical axis.
        label: Its name.
        x: Value on the horizontal axis where it has a mark; None for no mark.
        title: Tooltip of the mark.
    """

    y: float
    label: str
    x: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: values on a linear or a logarithmic scale, with its ticks."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    @classmethod
    def of_values(cls, values: Sequence[float]) -> Axis:
        """Return the axis of a few values, with a tick at each: logarithmic if they differ much and are above 0."""
        low, high = min(values), max(values)
        log = 0 < _LOG_FACTOR * low < high
        margin = (high / low) ** 0.08 if log else 0.08 * (high - low) or 0.1 * high or 1.0
        ends = (low / margin, high * margin) if log else (low - margin, high + margin)
        return cls(*ends, log, tuple((value, f"{value:g}") for value in values))

    @classmethod
    def of_names(cls, names: Sequence[str]) -> Axis:
        """Return the axis of names, which lie at 0, 1, 2 and so on."""
        return cls(-0.5, len(names) - 0.5, log=False, ticks=tuple(enumerate(names)))

    @classmethod
    def of_seconds(cls, seconds: Sequence[float]) -> Axis:
        """Return the axis of times: from 0, or logarithmic if they differ much."""
        smallest, largest = max(min(seconds), 1e-3), max(*seconds, 1e-3)
        if largest <= _LOG_FACTOR * smallest:
            return cls(0.0, 1.06 * largest, log=False, ticks=_round_ticks(0.0, 1.06 * largest, 6))
        low, high = smallest / 1.3, largest * 1.3
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        # Fewer ticks where the axis spans many powers of ten.
        factors = (1, 2, 5) if len(powers) < 4 else (1, 3) if len(powers) < 6 else (1,)
        values = [factor * 10.0**power for power in powers for factor in factors]
        return cls(low, high, log=True, ticks=tuple((v, f"{v:,.12g}") for v in values if low <= v <= high))

    def place(self, value: float) -> float:
        """Return the position of a value on the chart."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def chart(
    lines: Sequence[Line],
    references: Sequence[Reference],
    axis: Axis,
    name: str,
    label: str,
    *,
    spread: bool = False,
    value_name: str = "test top-1 (%)",
) -> Safe:
    """Draw the accuracy of methods, or another quantity above 0.

    Args:
        lines: The methods.
        references: Runs on all data.
        axis: The horizontal axis.
        name: Its name.
        label: Description of the chart for screen readers.
        spread: Whether marks of the same value are drawn side by side.
        value_name: Name of the vertical axis.
    """
    marks = [mark for line in lines for mark in line.marks]
    values = [mark.y + side * mark.spread for mark in marks for side in (-1, 1)] + [line.y for line in references]
    low, high, ticks = _accuracy_range(min(values), max(values))

    def height(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = [
        tag("text", value_name, x=4, y=14, class_="axis"),
        tag("text", name, x=(_WIDTH + _LEFT) / 2, y=_HEIGHT - 6, class_="axis middle"),
    ]
    for value, text in ticks:
        y = f"{height(value):.1f}"
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", text, x=_LEFT - 6, y=f"{height(value) + 4:.1f}", class_="tick end"))
    parts += _axis_ticks(axis)
    parts += [part for line in lines for part in _draw_line(line, axis, height, _shift(line, lines) if spread else 0.0)]
    stars = []
    for reference, y_label in zip(references, _label_heights([height(r.y) - 4 for r in references]), strict=True):
        y = f"{height(reference.y):.1f}"
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="reference"))
        stars.append(tag("text", reference.label, x=_LEFT + 4, y=f"{y_label:.1f}", class_="tick halo"))
        if reference.x is not None:
            star = tag("g", tag("path", d=_STAR), tag("title", reference.title), class_="star")
            stars.append(_moved(star, axis.place(reference.x), height(reference.y), 5.0))
    return tag("svg", parts, stars, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label, class_="chart")


def legend(lines: Sequence[tuple[str, Line]], *, reference: bool) -> Safe:
    """List the names of lines with their color, shape and dashes."""
    items = [tag("li", _swatch(line_sample(line)), tag("span", breakable(name))) for name, line in lines]
    if reference:
        line = tag("line", x1=1, x2=29, y1=7, y2=7, class_="reference")
        star = _moved(tag("path", d=_STAR, class_="star"), 15, 7, 4.5)
        items.append(tag("li", _swatch(line, star), tag("span", "all data")))
    return tag("ul", items, class_="legend", aria_label="Methods")


def line_sample(line: Line) -> Safe:
    """Draw a piece of a line with a mark, 30 wide and 14 high."""
    stroke = tag("line", x1=1, x2=29, y1=7, y2=7, class_=_trend(line)) if line.joined else None
    return render([stroke, _moved(_shape(line), 15, 7, 4.0)])


def breakable(method: str) -> Safe:
    """Return the name of a method that may be broken between its options."""
    pieces = re.split(r"(?<=[:,/=])", method)
    return render([pieces[0], *((tag("wbr"), piece) for piece in pieces[1:])])


def interval(gap: Difference, reach: float) -> Safe:
    """Draw a difference as a point on a line with its 95% interval; what lies beyond the edge is drawn at it.

    Args:
        gap: The difference; one beyond the edge becomes an arrow.
        reach: Value at either end of the line, above 0.
    """

    def place(value: float) -> float:
        return _INTERVAL_WIDTH / 2 * (1 + max(-1.0, min(1.0, value / reach)) * 0.97)

    y = _INTERVAL_HEIGHT / 2
    kind = "unclear" if not gap.is_significant else "good" if gap.mean > 0 else "bad"
    middle = f"{_INTERVAL_WIDTH / 2:g}"
    parts = [tag("line", x1=middle, x2=middle, y1=0, y2=_INTERVAL_HEIGHT, class_="zero")]
    if gap.n > 1:
        ends = [place(gap.mean - gap.half_width), place(gap.mean + gap.half_width)]
        parts.append(tag("line", x1=f"{ends[0]:.1f}", x2=f"{ends[1]:.1f}", y1=y, y2=y, class_=f"whisker {kind}"))
    shape = _SHAPES[0] if abs(gap.mean) <= reach else _ARROWS[gap.mean > 0]
    parts.append(_moved(tag("path", d=shape, class_=kind), place(gap.mean), y, 4.0))
    label, box = f"Difference from random {gap.mean:+.2f}", f"0 0 {_INTERVAL_WIDTH} {_INTERVAL_HEIGHT}"
    return tag("svg", parts, viewBox=box, role="img", aria_label=label, class_="interval")


def reach_of(gaps: Sequence[Difference]) -> float:
    """Return the range of differences to draw: all intervals, but at most three times as far as the median one."""
    ends = [abs(gap.mean) + (gap.half_width if gap.n > 1 else 0.0) for gap in gaps]
    return max(min(max(ends), 3 * statistics.median(ends)), 0.1) if ends else 1.0


def _draw_line(line: Line, axis: Axis, height: Callable[[float], float], shift: float) -> list[Safe]:
    places = [(axis.place(mark.x) + shift, height(mark.y), mark) for mark in line.marks]
    color = _color(line.number)
    parts = []
    if line.joined and len(places) > 1:
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        parts.append(tag("path", d=path, class_=_trend(line)))
    for x, y, mark in places:
        if mark.spread:
            ends = [f"{height(mark.y + side * mark.spread):.1f}" for side in (-1, 1)]
            parts.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=ends[0], y2=ends[1], class_=f"bar {color}"))
        parts.append(_moved(_shape(line, mark.title), x, y, mark.radius))
    return parts


def _shift(line: Line, lines: Sequence[Line]) -> float:
    """Return how far the marks of a line are moved sideways, so that those of one fraction do not cover each other."""
    step = min(6.0, _MAX_SHIFT / max(len(lines) - 1, 1))
    return (list(lines).index(line) - (len(lines) - 1) / 2) * step


def _axis_ticks(axis: Axis) -> list[Safe]:
    parts = []
    free = 0.0
    for value, text in axis.ticks:
        x, half = axis.place(value), 3.6 * len(text) + 2
        if x - half >= free:
            parts.append(tag("text", text, x=f"{x:.1f}", y=_HEIGHT - _BOTTOM + 18, class_="tick middle"))
            free = x + half
        y = _HEIGHT - _BOTTOM
        parts.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=y, y2=y + 4, class_="grid"))
    return parts


def _label_heights(heights: Sequence[float]) -> list[float]:
    """Return heights of labels, from those of their lines, that are far enough apart; the lower one stays."""
    placed: dict[int, float] = {}
    ceiling = math.inf
    for index in sorted(range(len(heights)), key=lambda i: -heights[i]):
        ceiling = min(heights[index], ceiling - _LABEL_GAP)
        placed[index] = ceiling
    return [placed[index] for index in range(len(heights))]


def _accuracy_range(low: float, high: float) -> tuple[float, float, tuple[tuple[float, str], ...]]:
    """Return the ends of the vertical axis, with room above for a label, and its ticks."""
    room = max(high - low, min(high, 1.0)) or 1.0
    low, high = max(0.0, low - 0.06 * room), high + 0.1 * room
    return low, high, _round_ticks(low, high, 8)


def _round_ticks(low: float, high: float, count: int) -> tuple[tuple[float, str], ...]:
    """Return at most `count` round numbers in a range, and their texts."""
    steps = (factor * 10.0**power for power in range(-4, 12) for factor in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step < count)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return tuple((number * step, f"{number * step:,.10g}") for number in numbers)


def _shape(line: Line, title: str | None = None) -> Safe:
    shape = _SHAPES[(line.number + line.number // COLORS) % len(_SHAPES)]
    children = () if title is None else (tag("title", title),)
    kind = "mark hollow" if line.hollow else "mark"
    return tag("g", tag("path", d=shape), children, class_=f"{kind} {_color(line.number)}")


def _trend(line: Line) -> str:
    return f"trend {'dashed ' if line.dashed else ''}{_color(line.number)}"


def _color(number: int) -> str:
    return f"c{number % COLORS}"


def _moved(shape: Safe, x: float, y: float, radius: float) -> Safe:
    return tag("g", shape, transform=f"translate({x:.1f} {y:.1f}) scale({radius:g})")


def _swatch(*children: Safe) -> Safe:
    return tag("svg", children, viewBox="0 0 30 14", class_="swatch", aria_hidden="true")
