"""`kdfast distill --list-terms`: the terms of the loss, made from their registry."""

from __future__ import annotations

from typing import Any

from kdfast.cli.output import say


def list_terms(context: Any, _parameter: Any, asked: bool) -> None:
    """Print every term with what it needs, its options and its tuned weight, and exit."""
    if not asked:
        return
    # The registry imports torch, so it is imported only when it is printed.
    from kdfast.distillation.losses.registry import LOSSES

    formatter = context.make_formatter()
    for title, reads_logits in (
        ("Terms of the logits, from a cache or a teacher", True),
        ("Terms of activations", False),
    ):
        with formatter.section(title):
            formatter.write_dl(
                [(name, _describe(entry)) for name, entry in LOSSES.items() if (not entry.taps) == reads_logits]
            )
    say(formatter.getvalue().strip("\n"))
    context.exit()


def _describe(entry: Any) -> str:
    parts = [f"{entry.summary}. {entry.source}."]
    if entry.taps == ("pooled",):
        parts.append("Reads pooled features: from --teacher, or from --cache with --views 1.")
    elif entry.taps:
        parts.append(f"Reads {', '.join(entry.taps)}: needs --teacher.")
    if entry.initial:
        parts.append("Trains alone in the first epochs, and is 0 afterwards (--initial-epochs).")
    if entry.prepares:
        parts.append("Is fitted to the teacher in the first epochs (--initial-epochs).")
    if entry.options:
        parts.append(f"Options: {', '.join(f'{name}={value:g}' for name, value in entry.options.items())}.")
    parts.append(f"Weight with --kd-preset tuned: {entry.tuned:g}.")
    return " ".join(parts)
