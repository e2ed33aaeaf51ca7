"""Help about scores, rules and selectors, made from their registries.

`kdfast score --help` and `kdfast prune --help` list every entry; `--help-options` prints the options of some of them.
The registries import torch, so they are imported only when such help is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from kdfast.cli.command import Command
from kdfast.cli.output import say
from kdfast.errors import look_up

if TYPE_CHECKING:
    from kdfast.pruning.options import Option


class Entry(NamedTuple):
    """A score, rule or selector, the flag that sets its options, and the options of each preset that it has."""

    title: str
    summary: str
    flag: str
    options: Mapping[str, Option]
    presets: Mapping[str, Mapping[str, Option]] = MappingProxyType({})


class ScoreCommand(Command):
    """A command with --method NAME, a score."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the list of scores below the options."""
        super().format_epilog(ctx, formatter)
        for title, entries in self.registries().items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.summary) for name, entry in entries.items()])
        formatter.write_paragraph()
        formatter.write_text(f"To print the options of one: {ctx.command_path} --method NAME --help-options")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; --help-options needs none of the required options."""
        if "--help-options" in args:
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
            if given.get("help_options"):
                formatter = ctx.make_formatter()
                for entry in self.selected(given):
                    write_options(formatter, entry)
                say(formatter.getvalue().strip("\n"))
                ctx.exit()
        return super().parse_args(ctx, args)

    def registries(self) -> dict[str, dict[str, Entry]]:
        """Return the entries of each registry by the title of its list."""
        return {"Scores (--method)": scores("--option")}

    def selected(self, given: Mapping[str, Any]) -> list[Entry]:
        """Return the entries that the raw values of the options name; all of them if they name none.

        Raises:
            UsageError: There is no such entry; the nearest is suggested.
        """
        entries = scores("--option")
        method = given.get("method")
        return [look_up(entries, method, "score")] if isinstance(method, str) else list(entries.values())


class PruneCommand(ScoreCommand):
    """A command with --method NAME, a score or a selector, and --rule NAME."""

    def registries(self) -> dict[str, dict[str, Entry]]:
        """Return the entries of each registry by the title of its list."""
        return {
            "Scores (--method)": scores("--score-option"),
            "Methods that select the subset directly (--method)": selectors(),
            "Rules (--rule)": rules(),
        }

    def selected(self, given: Mapping[str, Any]) -> list[Entry]:
        """Return the score with its rule, the selector or the rule that is named; all entries if none is."""
        from kdfast.pruning.scores.registry import SCORES

        method, rule = (value if isinstance(value := given.get(key), str) else None for key in ("method", "rule"))
        if method is None and rule is None:
            return [entry for entries in self.registries().values() for entry in entries.values()]
        entries = {**scores("--score-option"), **selectors()}
        found = [] if method is None else [look_up(entries, method, "method")]
        name = rule or (SCORES[method].rule if method in SCORES else None)
        return found if name is None else [*found, look_up(rules(), name, "rule")]


def scores(flag: str) -> dict[str, Entry]:
    """Return every score, with options set by a flag."""
    from kdfast.pruning.scores.registry import SCORES

    return {
        name: Entry(f"Score {name}", f"{method.summary}{_inputs(method.needs)}", flag, method.options)
        for name, method in SCORES.items()
    }


def rules() -> dict[str, Entry]:
    """Return every selection rule."""
    from kdfast.pruning.rules.registry import RULES

    return {name: Entry(f"Rule {name}", rule.summary, "--option", rule.options) for name, rule in RULES.items()}


def selectors() -> dict[str, Entry]:
    """Return every method that selects the subset directly."""
    from kdfast.pruning.selectors import SELECTORS

    return {name: Entry(f"Method {name}", m.summary, "--option", m.options, m.presets) for name, m in SELECTORS.items()}


def write_options(formatter: Any, entry: Entry) -> None:
    """Write the options of an entry as a section, or as one section for each of its presets."""
    for preset, options in entry.presets.items():
        write_options(formatter, Entry(f"{entry.title}, preset={preset}", entry.summary, entry.flag, options))
    if entry.presets:
        return
    with formatter.section(entry.title):
        formatter.write_text(entry.summary)
        if not entry.options:
            formatter.write_text("No options.")
            return
        formatter.write_text(f"Options, each as {entry.flag} NAME=VALUE:")
        with formatter.indentation():
            formatter.write_dl([(f"{name}={_values(o)}", _meaning(o)) for name, o in entry.options.items()])


def _inputs(needs: frozenset[str]) -> str:
    return f" (from --{' or --'.join(sorted(needs))})" if needs else ""


def _values(option: Option) -> str:
    if option.span:
        return "FIRST..LAST"
    return "|".join(option.choices) or ("INTEGER" if option.integer else "NUMBER")


def _meaning(option: Option) -> str:
    """Return the summary with the default and the range."""
    facts = [f"default: {'automatic' if option.default is None else option.default}"]
    low, high = (f"{bound:g}" for bound in (option.low, option.high))
    if (low, high) != ("-inf", "inf"):
        facts.append(f"from {low}" if high == "inf" else f"{low} to {high}" if low != "-inf" else f"up to {high}")
    return f"{option.summary}  [{'; '.join(facts)}]"
