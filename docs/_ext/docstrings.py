"""Convert docstrings to reStructuredText: single backticks are code, indented blocks and vertical bars are literal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

# Double backticks, single backticks, and characters that are markup in reStructuredText.
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
        yield line if in_literal or line.lstrip().startswith(">>>") else _PIECES.sub(_convert_piece, line)
        previous = line


def _convert_piece(match: re.Match[str]) -> str:
    if match[1]:
        return match[1]
    return f"``{match[2]}``" if match[2] else f"\\{match[3]}"


def _process_docstring(sphinx: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = to_rest(lines)


def setup(sphinx: Sphinx) -> dict[str, bool]:
    """Register the extension; it runs before napoleon."""
    sphinx.connect("autodoc-process-docstring", _process_docstring, priority=100)
    return {"parallel_read_safe": True}
