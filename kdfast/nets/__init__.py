"""Networks and their checkpoints."""

from __future__ import annotations

from kdfast.nets.head import find_classifier, forward_with_features
from kdfast.nets.registry import NETS, build_net

__all__ = ["NETS", "build_net", "find_classifier", "forward_with_features"]
