"""HTML with automatic escaping: every string is escaped unless it was built by these functions.

Control characters and bytes that are not UTF-8, as in names of classes, appear as escapes.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from kdfast.text import printable

_VOID = frozenset({"br", "img", "meta", "rect", "line", "path", "wbr"})


class Safe(str):
    """Markup. Any other string is text and is escaped when inserted into markup."""

    __slots__ = ()


def render(child: object) -> Safe:
    """Convert to markup: Safe unchanged, None to nothing, an iterable to its concatenated items, else escaped text."""
    if child is None:
        return Safe()
    if isinstance(child, Safe):
        return child
    if isinstance(child, Iterable) and not isinstance(child, str):
        return Safe("".join(render(one) for one in child))
    return Safe(html.escape(printable(str(child))))


def tag(element: str, /, *children: object, **attributes: object) -> Safe:
    """Build an element.

    Args:
        element: Name of the element.
        children: Safe markup, text, None, or iterables of these.
        attributes: By name, with `_` for `-` and a trailing `_` removed (`class_`). None and False omit the attribute,
            True writes it without a value.
    """
    parts = [element]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        parts.append(name if value is True else f'{name}="{html.escape(printable(str(value)))}"')
    opening = f"<{' '.join(parts)}>"
    if element in _VOID:
        return Safe(opening[:-1] + "/>")
    return Safe(f"{opening}{render(children)}</{element}>")


def table(caption: object, titles: Iterable[object], rows: Iterable[Iterable[object]], **attributes: object) -> Safe:
    """Build a table whose first column holds the row headers; a cell that is already a `td` is used unchanged."""
    head = tag("thead", tag("tr", (tag("th", title, scope="col") for title in titles)))
    body = (tag("tr", tag("th", cells[0], scope="row"), map(_cell, cells[1:])) for cells in map(list, rows))
    content = tag("table", tag("caption", caption), head, tag("tbody", body), **attributes)
    # tabindex lets keyboard users scroll a table that is wider than the page.
    return tag("div", content, class_="scroll", tabindex="0", role="group")


def statistics_list(pairs: Iterable[tuple[str, str]]) -> Safe:
    """Build the list of named numbers at the top of a page."""
    return tag("dl", (tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="stats")


def _cell(content: object) -> Safe:
    if isinstance(content, Safe) and content.startswith("<td"):
        return content
    return tag("td", content)
