"""Networks and their checkpoints."""

from __future__ import annotations

from kdfast.nets.head import classifier_of, logits_and_features
from kdfast.nets.registry import NETS, build_net

__all__ = ["NETS", "build_net", "classifier_of", "logits_and_features"]
