"""The former place of `open_source` and `from_datasets`, so that scripts that import them from here keep working."""

from __future__ import annotations

from kdfast.data.readers.datasets import from_datasets
from kdfast.data.readers.registry import SOURCES, open_source

__all__ = ["SOURCES", "from_datasets", "open_source"]
