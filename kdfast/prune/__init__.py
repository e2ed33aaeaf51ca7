"""Pruning: scores, selection rules, subsets."""
