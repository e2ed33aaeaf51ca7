"""`kdfast clean`: delete what a finished run does not need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.output import show


def clean(
    run: Annotated[list[Path], typer.Argument(help="Folders of runs; of a teacher, T.pt.run.", metavar="RUN...")],
    force: Annotated[
        bool, typer.Option("--force", help="Also clean a run that is not finished; it then starts over.")
    ] = False,
) -> None:
    """Delete the checkpoints of finished runs, and files that killed processes left behind; results stay."""
    from kdfast.distillation.folder import clean_run

    cleaned = {str(folder): clean_run(folder, force=force) for folder in run}
    show(
        "\n".join(
            f"{name}: deleted {one.files} file{'s' * (one.files != 1)}, {_format_bytes(one.bytes)}"
            for name, one in cleaned.items()
        ),
        {"runs": [{"run": name, "files": one.files, "bytes": one.bytes} for name, one in cleaned.items()]},
    )


def _format_bytes(count: int) -> str:
    return f"{count} bytes" if count < 1e5 else f"{count / 1e6:.1f} MB ({count} bytes)"
