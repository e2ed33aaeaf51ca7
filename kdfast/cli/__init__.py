"""The `kdfast` command: parse, call, print; no logic. One file per command or group of commands."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import typer

from kdfast.cli.command import Command
from kdfast.cli.commands import cache, data, distill, dynamics, evaluate, prune, report, score, sweep, system, teacher
from kdfast.cli.messages import find_command, translate
from kdfast.cli.method_help import PruneCommand, ScoreCommand
from kdfast.errors import Interrupted, KdfastError

app = typer.Typer(
    name="kdfast",
    help="Distill a trained teacher into a smaller student, on less data.",
    epilog="Exit codes: 0 all planned work ran; 2 usage; 3 bad or mismatching data, cache, subset or checkpoint; "
    "4 the output cannot be written; 5 training diverged; 6 a solver did not reach its tolerance; "
    "75 interrupted: run the same command again to resume; 1 unexpected error (KDFAST_DEBUG=1 shows the traceback).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor")(system.doctor)
app.add_typer(data.app, name="data")
app.add_typer(teacher.app, name="teacher")
app.add_typer(cache.app, name="cache")
app.command("dynamics", cls=Command)(dynamics.dynamics)
app.command("score", cls=ScoreCommand)(score.score)
app.command("prune", cls=PruneCommand)(prune.prune)
app.command("distill", cls=Command)(distill.distill)
app.command("sweep", cls=Command)(sweep.sweep)
app.add_typer(report.app, name="report")
app.command("eval")(evaluate.evaluate)

# The code that the option parser returns after a KeyboardInterrupt.
_PARSER_INTERRUPT = 130


def main() -> None:
    """Run the command line; turn errors into one line on stderr and an exit code of `kdfast.errors`."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False, prog_name=app.info.name)
        if code == _PARSER_INTERRUPT:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except KdfastError as error:
        if os.environ.get("KDFAST_DEBUG"):
            raise
        command = find_command(typer.main.get_command(app), sys.argv[1:])
        print(f"kdfast: {translate(str(error), command)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("kdfast: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):
            _wrong_usage(error)
        if os.environ.get("KDFAST_DEBUG"):
            raise
        kind = type(error).__name__
        print(
            f"kdfast: unexpected {kind}: {' '.join(str(error).split())} (KDFAST_DEBUG=1 shows the traceback)",
            file=sys.stderr,
        )
        sys.exit(1)


def _wrong_usage(error: Any) -> NoReturn:
    """Print why the option parser refused a command line, and exit; its exception classes depend on typer's version."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        where = context.command_path if context is not None else "kdfast"
        message = " ".join(error.format_message().split()).rstrip(".")
        print(f"kdfast: {message}; see {where} --help", file=sys.stderr)
    sys.exit(error.exit_code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
