"""A plan as text: the stages in a table, then what pruning saves."""

from __future__ import annotations

from collections.abc import Callable

from kdfast.files.space import format_bytes
from kdfast.planning.plan import FlowPlan
from kdfast.planning.savings import paying_students
from kdfast.planning.stages import Flow, Stage

Row = tuple[str, str, str, str]
Words = Callable[[float], str]

_SHORT = 9.95  # seconds below this have a decimal


def render_plan(plan: FlowPlan, format_seconds: Words) -> str:
    """Return the lines of a plan.

    Args:
        plan: The plan.
        format_seconds: Returns a time of ten seconds or more in words.
    """

    def words(seconds: float) -> str:
        return f"{seconds:.1f} s" if seconds < _SHORT else format_seconds(seconds)

    pruned, steps = plan.pruned, plan.same_steps
    rows = [("on the kept samples", "", "time", "writes"), *_rows(pruned, words), ("", "", "", "")]
    rows += [("on all samples", "", "time", "writes"), *_rows(plan.same_epochs, words)]
    rows.append(_row("  or distill", steps.each, words))
    rows.append(_total(steps, "steps", words))
    first, second, third, fourth = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        f"{name:<{first}}  {work:<{second}}  {time:>{third}}  {size:>{fourth}}".rstrip()
        for name, work, time, size in rows
    ]
    lines += ["", _saving(pruned, plan.same_epochs, "epochs", words), _saving(pruned, steps, "steps", words)]
    lines += ["", _describe_rates(plan)]
    if pruned.size > plan.free:
        lines.append(f"the disk has {format_bytes(plan.free)} free, and the kept samples need more")
    return "\n".join(lines)


def _rows(flow: Flow, words: Words) -> list[Row]:
    stages = [_row(f"  {stage.name}", stage, words) for stage in (*flow.once, flow.each)]
    return [*stages, _total(flow, "epochs", words)]


def _row(name: str, stage: Stage, words: Words) -> Row:
    return name, stage.work, words(stage.seconds), format_bytes(stage.size)


def _total(flow: Flow, unit: str, words: Words) -> Row:
    what = f"as many {unit}" if flow.students == 1 else f"as many {unit}, {flow.students} students"
    return "in all", what, words(flow.seconds), format_bytes(flow.size)


def _saving(pruned: Flow, whole: Flow, unit: str, words: Words) -> str:
    """Return a line that compares the flow on the kept samples with one on all of them."""
    saved, total = whole.seconds - pruned.seconds, words(whole.seconds)
    share = f"{100 * abs(saved) / whole.seconds:.0f}%"
    what = f"saves {words(saved)} of {total}" if saved >= 0 else f"takes {words(-saved)} more than {total}"
    return f"pruning {what} ({share}) against all samples for as many {unit}, and {_pays(pruned, whole)}"


def _pays(pruned: Flow, whole: Flow) -> str:
    found = paying_students(pruned, whole)
    if found is None:
        return "never pays"
    least, most = found
    number, where = (least, "from") if most is None else (most, "up to")
    return f"pays {where} {number} student{'s' * (number > 1)}{' on' * (most is None)}"


def _describe_rates(plan: FlowPlan) -> str:
    """Return a line with the rates that most of the time follows from."""
    rates, found = plan.rates, []
    for name, seconds in (("teacher", rates.view or rates.cached), ("student", rates.trained)):
        if seconds:
            found.append(f"{name} {1 / seconds:.0f} images/s")
    if rates.written:
        found.append(f"disk {format_bytes(1 / rates.written)}/s")
    return f"measured in {plan.measured:.0f} s: {', '.join(found)}"
