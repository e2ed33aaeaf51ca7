"""IF-Beta: sample a subset by a learned Beta density over the ranks of an influence score.

For a candidate (a, b), subsets are drawn and a small proxy is trained on each in the teacher's feature space with the
distillation loss. The proxies' performance on held-out training samples is the reward that the search over (a, b)
maximizes. The inputs are the teacher's cache and, if they are not computed from it, the scores.

Source: Wu et al., "Distill on a Diet: Efficient Knowledge Distillation via Learnable Data Pruning", 2026, arXiv
2606.25488. The published search is `TwoStages` with `Linear` proxies; all other parts are kdfast's own.
"""

from kdfast.pruning.if_beta.estimators import ESTIMATORS
from kdfast.pruning.if_beta.learner import IFBeta, IFBetaResult
from kdfast.pruning.if_beta.proxy import PROXIES
from kdfast.pruning.if_beta.reward import REWARDS
from kdfast.pruning.if_beta.scores import SAMPLE_SCORES

__all__ = ["ESTIMATORS", "PROXIES", "REWARDS", "SAMPLE_SCORES", "IFBeta", "IFBetaResult"]
