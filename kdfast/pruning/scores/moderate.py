"""The distance of a sample's features to the center of its class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdfast.data.arrays import gather_groups, group_by_class
from kdfast.data.stateless_random import IntArray
from kdfast.pruning.options import Option
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import (
    USE,
    ScoreInputs,
    ScoreResult,
    refuse_epochs,
    require_dynamics,
    require_features,
    use_dynamics,
)
from kdfast.pruning.scores.trajectory import average_over_runs

OPTIONS = {
    "use": USE,
    "epoch": Option(
        None,
        "number of epochs after which the dynamics are read; automatic: the last that has features",
        low=1,
        high=1e6,
        integer=True,
    ),
    "fidelity": Option(
        "paper",
        "center of a class: mean of the features (paper), or median of each feature (public code)",
        choices=("paper", "code"),
    ),
}


def moderate(inputs: ScoreInputs) -> ScoreResult:
    """Euclidean distance of the features to the center of the sample's class; the rule `moderate` keeps the middle.

    From dynamics it is the mean over runs, by default at the last epoch that has features.

    Source:
        Xia et al., Moderate Coreset: A Universal Method of Data Selection for Real-world Data-efficient Deep
        Learning, ICLR 2023. The center is the mean in the paper and the median of each feature in its code, which
        ranks the samples of all classes together (`balance` unbalanced).
    """
    median = inputs.options["fidelity"] == "code"
    use = inputs.options["use"]
    if use == "cache" or (use is None and inputs.features is not None):
        refuse_epochs(inputs, "moderate")
        found = _center_distances(require_features(inputs, "moderate"), inputs.labels, median)
        return ScoreResult(found, used={"use": "cache"})
    use_dynamics(inputs, "moderate")
    dynamics = require_dynamics(inputs, "moderate")
    asked = inputs.options["epoch"]
    epoch = dynamics.feature_epochs[-1] + 1 if asked is None and dynamics.feature_epochs else int(asked or 1)

    def distances(run: int) -> FloatArray:
        return _center_distances(dynamics.features(run, epoch - 1), inputs.labels, median)

    return ScoreResult(average_over_runs(dynamics, distances), used={"use": "dynamics", "epoch": epoch})


def _center_distances(features: npt.NDArray[np.float32], labels: IntArray, median: bool) -> FloatArray:
    distances = np.empty(len(labels))
    groups = list(group_by_class(labels).values())
    for members, found in zip(groups, gather_groups(features, groups), strict=True):
        rows = found.astype(np.float64)
        center = np.median(rows, axis=0) if median else rows.mean(axis=0)
        distances[members] = np.linalg.norm(rows - center, axis=1)
    return distances
