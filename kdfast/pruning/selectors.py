"""The registry of selectors: methods that select a subset directly, without a score and a rule."""

from __future__ import annotations

from kdfast.pruning.if_beta.selector.select import IF_BETA
from kdfast.pruning.selector import SubsetSelector

SELECTORS: dict[str, SubsetSelector] = {"if-beta": IF_BETA}
