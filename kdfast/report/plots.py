"""What the plots share: names in legends that are shown as they are, and .png files that kdfast recognizes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.files import atomic_path, check_replaceable
from kdfast.text import printable

_DPI = 120
_SOFTWARE = b"Software\0"
_SIGNATURE = "kdfast"
_HEAD = 512  # bytes in which the size and the name of the software are found
# Height in pixels of the plots, and of what their width is a multiple, in versions that left matplotlib's signature.
_OLDER_SIZES = {600: 840, 480: 1200}


def check_plot_path(path: Path) -> None:
    """Check, before the work, that a plot may be written. Writes nothing.

    Raises:
        OutputError: There is a file that is not a plot of kdfast.
    """
    check_replaceable(path, _is_own_plot)


def save_plot(figure: Any, path: Path) -> None:
    """Write a figure as a .png file, atomically.

    Raises:
        OutputError: The file cannot be written, or would replace one that kdfast did not write.
    """
    check_plot_path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png", metadata={"Software": _SIGNATURE})


def add_legend(panel: Any, lines: Mapping[str, Any]) -> None:
    """Add a legend that shows names literally: matplotlib reads `$` as mathematics and omits names that begin with `_`.

    Args:
        panel: The axes.
        lines: A line of the plot by its name.
    """
    legend = panel.legend(list(lines.values()), [str(number) for number in range(len(lines))])
    for text, name in zip(legend.get_texts(), lines, strict=True):
        text.set(text=printable(name), parse_math=False)


def _is_own_plot(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    if not head.startswith(b"\x89PNG\r\n\x1a\n") or len(head) < 24:
        return False
    software = head.partition(_SOFTWARE)[2]
    width, height = struct.unpack(">II", head[16:24])
    older = height in _OLDER_SIZES and width % _OLDER_SIZES[height] == 0
    return software.startswith(_SIGNATURE.encode()) or (older and software.startswith(b"Matplotlib version"))
