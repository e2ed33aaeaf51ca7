"""The commands, and what one of them returns to the shell."""

from __future__ import annotations

import errno
import functools
import os
import sys
from typing import Any, NoReturn

import typer

from kdfast.cli.command import Command
from kdfast.cli.commands import data, distill, dynamics, prune, score, sweep, system
from kdfast.cli.commands.caches import build, merge, outputs, tokens, verify
from kdfast.cli.commands.results import plan, report, reproduce
from kdfast.cli.commands.teachers import average, flatten, importing, train
from kdfast.cli.commands.trained import clean, evaluate, export, predict
from kdfast.cli.messages import find_command, translate
from kdfast.cli.method_help import PruneCommand, ScoreCommand
from kdfast.cli.output import complain, complain_at_end, flush_output, prepare_streams
from kdfast.cli.paths import check_current_folder, shorten_path
from kdfast.cli.signals import INTERRUPTER, MESSAGE
from kdfast.errors import Interrupted, KdfastError, OutputError, UsageError

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
app.callback()(system.root)
app.command("doctor", cls=Command)(system.doctor)
app.add_typer(data.app, name="data")
teacher = typer.Typer(
    help="Train a teacher, import one trained elsewhere, average several, or flatten one for scores.",
    no_args_is_help=True,
)
teacher.command("train", cls=Command)(train.train)
teacher.command("import", cls=Command)(importing.import_)
teacher.command("average", cls=Command)(average.average)
teacher.command("flatten", cls=Command)(flatten.flatten)
app.add_typer(teacher, name="teacher")
build.app.command("merge", cls=Command)(merge.merge)
build.app.command("import", cls=Command)(outputs.import_outputs)
build.app.command("verify", cls=Command)(verify.verify)
build.app.command("import-tokens", cls=Command)(tokens.import_tokens)
build.app.command("verify-tokens", cls=Command)(tokens.verify_tokens)
app.add_typer(build.app, name="cache")
app.command("dynamics", cls=Command)(dynamics.dynamics)
app.command("score", cls=ScoreCommand)(score.score)
app.command("prune", cls=PruneCommand)(prune.prune)
app.command("distill", cls=Command)(distill.distill)
app.command("plan", cls=Command)(plan.plan)
app.command("sweep", cls=Command)(sweep.sweep)
app.command("reproduce", cls=Command)(reproduce.reproduce)
app.add_typer(report.app, name="report")
app.command("eval", cls=Command)(evaluate.evaluate)
app.command("predict", cls=Command)(predict.predict)
app.command("export", cls=Command)(export.export)
app.command("clean", cls=Command)(clean.clean)

# The code that the option parser returns after a KeyboardInterrupt.
_PARSER_INTERRUPT = 130
_NOT_WRITTEN = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG)


def run() -> NoReturn:
    """Run the command line of this process and exit."""
    prepare_streams()
    code = _run()
    try:
        flush_output()
    except OutputError as error:
        complain(f"kdfast: {error}")
        code = code or error.exit_code
    INTERRUPTER.ignore()
    sys.exit(code)


@functools.cache
def _root_command() -> Any:
    """Return the option parser's form of `app`; built once, since an error's message needs it a second time."""
    return typer.main.get_command(app)


def _run() -> int:
    """Run the command line; print what went wrong, and return the exit code."""
    try:
        check_current_folder()
        code = _root_command()(standalone_mode=False, prog_name=app.info.name)
        if code == _PARSER_INTERRUPT:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except KdfastError as error:
        if os.environ.get("KDFAST_DEBUG"):
            raise
        command = find_command(_root_command(), sys.argv[1:])
        _end(f"kdfast: {_without_force(translate(str(error), command))}")
        return Interrupted.exit_code if INTERRUPTER.received else error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _end(_without_force(MESSAGE))
        return Interrupted.exit_code
    except Exception as error:
        if INTERRUPTER.received:  # what was interrupted has made another error of it
            _end(_without_force(MESSAGE))
            return Interrupted.exit_code
        return _report_exception(error)


def _end(text: str) -> None:
    """Print why the command ends. torchrun may stop this process meanwhile, because another one has failed."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        INTERRUPTER.ignore()
    complain_at_end(text)


def _without_force(text: str) -> str:
    """Return a message that advises to resume, for a command line with --force, which would start over again."""
    return text.replace("same command again", "same command without --force") if "--force" in sys.argv[1:] else text


def _report_exception(error: Exception) -> int:
    """Print an error that is not one of kdfast, and return its exit code."""
    if hasattr(error, "format_message"):
        return _report_usage(error)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        _end(f"kdfast: {shorten_path(error.filename)}: {error.strerror}: use a shorter path")
        return UsageError.exit_code
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN and not error.filename:  # the help
        _end(f"kdfast: cannot write to the standard output: {error.strerror}")
        return OutputError.exit_code
    if os.environ.get("KDFAST_DEBUG"):
        raise error
    _end(f"kdfast: unexpected {type(error).__name__}: {error} (KDFAST_DEBUG=1 shows the traceback)")
    return 1


def _report_usage(error: Any) -> int:
    """Print why the option parser refused a command line; its exception classes depend on typer's version."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        where = context.command_path if context is not None else "kdfast"
        message = " ".join(error.format_message().split()).rstrip(".")
        _end(f"kdfast: {message}; see {where} --help")
    return int(error.exit_code)
