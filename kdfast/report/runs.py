"""Plots of finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast.distillation.folder import read_finished_run
from kdfast.errors import DataError
from kdfast.files import schemas
from kdfast.files.validate import decode_json, read_regular
from kdfast.report.plots import add_legend, check_plot_path, save_plot


def plot_runs(groups: Mapping[str, Sequence[Path]], out: Path) -> None:
    """Plot the training loss and, where recorded, the test accuracy of groups of runs against the step.

    Each run is a thin line in the color of its group. The legend shows the mean final accuracy of each group.

    Args:
        groups: Folders of the runs, by name of the group.
        out: The .png file to write.

    Raises:
        DataError: A folder holds no finished run, or a damaged one.
        CheckpointError: The student of a run is damaged, or is not the one that was evaluated.
        OutputError: The file cannot be written, or would replace one that kdfast did not write.
    """
    check_plot_path(out)
    # matplotlib is slow to import and only needed here.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    lines: dict[str, Any] = {}
    for number, (name, folders) in enumerate(groups.items()):
        finals = [_read_result(folder)["test_top1"] for folder in folders]
        label = f"{name}: {sum(finals) / len(finals):.1f}% (n = {len(finals)})"
        for folder in folders:
            rows = _read_metrics(folder)
            (line,) = left.plot(*_series(rows, "loss"), color=f"C{number}", linewidth=1)
            right.plot(*_series(rows, "test_top1"), color=f"C{number}", linewidth=1)
            lines.setdefault(label, line)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel="step", ylabel="test top-1 (%)")
    add_legend(left, lines)
    save_plot(figure, out)


def _read_result(folder: Path) -> dict[str, Any]:
    result = read_finished_run(folder)
    if result is None:
        raise DataError(
            f"{folder} holds no finished run, with result.json and student.pt: pass the folders of such runs"
        )
    return result


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    try:
        lines = read_regular(file).splitlines()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    return [decode_json(line, schemas.MetricsRow, f"line {number} of {file}") for number, line in enumerate(lines, 1)]


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the rows that have the metric."""
    present = [row for row in rows if name in row]
    return [row["step"] for row in present], [row[name] for row in present]
