"""Scores as other programs write them: arrays, pickles, tables and lists, read without changing the file."""

from __future__ import annotations

from kdfast.pruning.own_scores.read import OwnScores, describe_scores, read_own_scores

__all__ = ["OwnScores", "describe_scores", "read_own_scores"]
