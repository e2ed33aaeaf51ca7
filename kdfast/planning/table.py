"""A plan as text: the stages in a table, then what pruning saves."""

from __future__ import annotations

from collections.abc import Callable

from kdfast.files.space import format_bytes
from kdfast.planning.plan import FlowPlan
from kdfast.planning.savings import break_even
from kdfast.planning.stages import Flow, Stage

Row = tuple[str, str, str, str]


def render_plan(plan: FlowPlan, format_seconds: Callable[[float], str]) -> str:
    """Return the lines of a plan.

    Args:
        plan: The plan.
        format_seconds: Returns a time in words.
    """
    pruned = plan.pruned
    rows = [("on the kept samples", "", "time", "writes"), *_rows(pruned, format_seconds), ("", "", "", "")]
    rows += [("on all samples", "", "time", "writes"), *_rows(plan.same_epochs, format_seconds)]
    steps = plan.same_steps
    rows.append(_row("  or distill", steps.each, format_seconds))
    rows.append(
        ("in all", f"for as many steps{_students(steps)}", format_seconds(steps.seconds), format_bytes(steps.size))
    )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {work:<{widths[1]}}  {time:>{widths[2]}}  {size:>8}".rstrip()
        for name, work, time, size in rows
    ]
    lines += ["", _saving(pruned, plan.same_epochs, "for as many epochs", format_seconds)]
    lines.append(_saving(pruned, plan.same_steps, "for as many steps", format_seconds))
    if pruned.size > plan.free:
        lines.append(f"the disk has {format_bytes(plan.free)} free, less than that")
    return "\n".join(lines)


def _rows(flow: Flow, format_seconds: Callable[[float], str]) -> list[Row]:
    stages = [_row(f"  {stage.name}", stage, format_seconds) for stage in (*flow.once, flow.each)]
    total = ("in all", f"for as many epochs{_students(flow)}", format_seconds(flow.seconds), format_bytes(flow.size))
    return [*stages, total]


def _row(name: str, stage: Stage, format_seconds: Callable[[float], str]) -> Row:
    return name, stage.work, format_seconds(stage.seconds), format_bytes(stage.size)


def _students(flow: Flow) -> str:
    return "" if flow.students == 1 else f", {flow.students} students"


def _saving(pruned: Flow, whole: Flow, what: str, format_seconds: Callable[[float], str]) -> str:
    """Return a line that compares the two flows."""
    students, least = pruned.students, break_even(pruned, whole)
    saved = whole.seconds - pruned.seconds
    who = f"{students} student{'s' * (students > 1)}"
    if saved >= 0:
        text = f"pruning saves {format_seconds(saved)} of {format_seconds(whole.seconds)} with {who}"
    else:
        text = f"pruning takes {format_seconds(-saved)} more than {format_seconds(whole.seconds)} with {who}"
    pays = "never pays" if least is None else f"pays from {least} student{'s' * (least > 1)} on"
    return f"against all samples {what}: {text}; it {pays}"
