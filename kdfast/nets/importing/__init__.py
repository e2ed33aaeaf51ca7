"""Import of checkpoints that other code wrote."""

from __future__ import annotations

from kdfast.nets.importing.importer import import_checkpoint
from kdfast.nets.importing.report import ImportReport

__all__ = ["ImportReport", "import_checkpoint"]
