"""The registry of terms: a new one is a file and an entry in LOSSES."""

from __future__ import annotations

from kdfast.distillation.losses.base import TermEntry
from kdfast.distillation.losses.features.activation_boundaries import ACTIVATION_BOUNDARIES
from kdfast.distillation.losses.features.attention import ATTENTION
from kdfast.distillation.losses.features.contrastive import CONTRASTIVE
from kdfast.distillation.losses.features.factor_transfer import FACTOR_TRANSFER
from kdfast.distillation.losses.features.fitnets import FITNETS
from kdfast.distillation.losses.features.flow import FLOW
from kdfast.distillation.losses.features.probabilities import PROBABILITIES
from kdfast.distillation.losses.features.relations import RELATIONS
from kdfast.distillation.losses.features.review import REVIEW
from kdfast.distillation.losses.features.selectivity import SELECTIVITY
from kdfast.distillation.losses.features.similarity import POOLED_SIMILARITY, SIMILARITY
from kdfast.distillation.losses.features.variational import VARIATIONAL_INFORMATION
from kdfast.distillation.losses.logits.correlation import CORRELATION
from kdfast.distillation.losses.logits.decoupled import DECOUPLED
from kdfast.distillation.losses.logits.divergences import JENSEN_SHANNON, LOGIT_DISTANCE, REVERSE
from kdfast.distillation.losses.logits.standardized import STANDARDIZED, STANDARDIZED_DECOUPLED
from kdfast.errors import look_up

LOSSES: dict[str, TermEntry] = {
    "dkd": DECOUPLED,
    "ls": STANDARDIZED,
    "ls-dkd": STANDARDIZED_DECOUPLED,
    "dist": CORRELATION,
    "jsd": JENSEN_SHANNON,
    "reverse-kl": REVERSE,
    "logit-mse": LOGIT_DISTANCE,
    "fitnets": FITNETS,
    "at": ATTENTION,
    "ab": ACTIVATION_BOUNDARIES,
    "ft": FACTOR_TRANSFER,
    "fsp": FLOW,
    "nst": SELECTIVITY,
    "pkt": PROBABILITIES,
    "rkd": RELATIONS,
    "sp": SIMILARITY,
    "sp-pooled": POOLED_SIMILARITY,
    "vid": VARIATIONAL_INFORMATION,
    "review": REVIEW,
    "crd": CONTRASTIVE,
}


def get_term(name: str) -> TermEntry:
    """Return a term by name.

    Raises:
        UsageError: There is no such term; the nearest name is suggested.
    """
    return look_up(LOSSES, name, "term of the loss")
