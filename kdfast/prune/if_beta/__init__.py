"""IF-Beta: sample a subset by a learned Beta density over the ranks of an influence score.

For a candidate (a, b), subsets are drawn and a small proxy is trained on each in the teacher's feature space with the
distillation loss. The proxies' performance on held-out training samples is the reward that the search over (a, b)
maximizes. The only input is the teacher's cache.

Source: Wu et al., "Distill on a Diet: Efficient Knowledge Distillation via Learnable Data Pruning", 2026, arXiv
2606.25488. The abstract fixes this outline; the scores, proxies, reward and search are kdfast's own.
"""

from kdfast.prune.if_beta.estimators import ESTIMATORS
from kdfast.prune.if_beta.learner import IFBeta, IFBetaResult
from kdfast.prune.if_beta.proxy import PROXIES
from kdfast.prune.if_beta.reward import REWARDS
from kdfast.prune.if_beta.scores import SAMPLE_SCORES

__all__ = ["ESTIMATORS", "PROXIES", "REWARDS", "SAMPLE_SCORES", "IFBeta", "IFBetaResult"]
