"""Pruning: scores, selection rules and selectors, and the pipeline from them to subsets."""
