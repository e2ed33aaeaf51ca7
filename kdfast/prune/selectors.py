"""The registry of selectors: methods that select a subset directly, without a score and a rule."""

from __future__ import annotations

from kdfast.prune.if_beta.selector.select import IF_BETA
from kdfast.prune.selector import SubsetSelector

SELECTORS: dict[str, SubsetSelector] = {"if-beta": IF_BETA}
