"""Plots of runs and self-contained HTML pages about scores and subsets."""

from kdfast.report.runs import plot_runs

__all__ = ["plot_runs"]
