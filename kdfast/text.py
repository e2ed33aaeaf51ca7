"""Text for people: of unknown origin, such as class names and paths, made safe to show; and numbers with a noun."""

from __future__ import annotations

import re

# Control characters but newline and tab, halves of surrogate pairs (bytes of a name that are not UTF-8), and characters
# that change the direction of the text around them.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Return the text with every character that a terminal would obey, or no encoding has, as an escape.

    Newlines, tabs and all printable characters are unchanged. Bytes of a file name that are not UTF-8 become `\xNN`.
    """
    return _HIDDEN.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, see os.fsdecode
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shorten_text(text: str, length: int = 80) -> str:
    """Return a text for a message, cut to a number of characters."""
    return text if len(text) <= length else f"{text[:length]}..."


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
