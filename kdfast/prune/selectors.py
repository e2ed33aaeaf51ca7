"""Methods that choose the subset themselves, instead of a score from which a rule chooses."""

from __future__ import annotations

from kdfast.prune.if_beta.command import IF_BETA
from kdfast.prune.selector import Chooser, ChooserInputs

__all__ = ["CHOOSERS", "Chooser", "ChooserInputs"]

CHOOSERS: dict[str, Chooser] = {"if-beta": IF_BETA}
