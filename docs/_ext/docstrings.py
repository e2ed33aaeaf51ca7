"""Read docstrings as they are written: single backticks are code, indented blocks are literal, bars are bars."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

# In this order: double backticks, single backticks, and characters with a meaning in reStructuredText.
_PIECES = re.compile(r"(``.+?``)|(?<![:`\w])`([^`\n]+)`(?!`)|([|*])")
_SECTION = re.compile(r"[A-Z][a-z]+:( .*)?$")


def to_rest(lines: list[str]) -> Iterator[str]:
    """Yield the lines of a Google-style docstring, ready for napoleon."""
    in_section = in_literal = False
    previous = ""
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            in_section, in_literal = bool(_SECTION.match(line)), False
        if indented and not (in_section or in_literal or previous):
            in_literal = True
            yield "::"
            yield ""
        yield line if in_literal or line.lstrip().startswith(">>>") else _PIECES.sub(_piece, line)
        previous = line


def _piece(match: re.Match[str]) -> str:
    if match[1]:
        return match[1]
    return f"``{match[2]}``" if match[2] else f"\\{match[3]}"


def _process(sphinx: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = to_rest(lines)


def setup(sphinx: Sphinx) -> dict[str, bool]:
    """Register the extension; it runs before napoleon."""
    sphinx.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True}
