"""The `kdfast` command: parse, call, print; no logic. One file per command or group of commands."""

from __future__ import annotations

from typing import Any

from kdfast.cli.signals import INTERRUPTER
from kdfast.cli.threads import configure_threads


def main() -> None:
    """Run the command line; turn errors into one line on stderr and an exit code of `kdfast.errors`."""
    # First of all, because the imports below take a moment too.
    INTERRUPTER.install()
    try:
        configure_threads()
        from kdfast.cli.program import run

        run()
    except KeyboardInterrupt:  # before the command began, or while its outcome was being printed
        INTERRUPTER.exit()


def __getattr__(name: str) -> Any:
    """Return `app`, the Typer application, for scripts that add commands or entries of their own; imported on use."""
    if name == "app":
        from kdfast.cli.program import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
