"""Subsets of the training split: their files, of kdfast and of others, and how a budget is divided among classes."""

from __future__ import annotations

from kdfast.data.subset.budgets import class_budgets, subset_size
from kdfast.data.subset.file import (
    Subset,
    check_subset_file,
    check_subset_path,
    digest_of,
    open_subset,
    read_origin,
    read_subset,
    write_subset,
)

__all__ = [
    "Subset",
    "check_subset_file",
    "check_subset_path",
    "class_budgets",
    "digest_of",
    "open_subset",
    "read_origin",
    "read_subset",
    "subset_size",
    "write_subset",
]
