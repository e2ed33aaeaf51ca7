"""Scores from the trajectory of training: forgetting and the area under the margin.

They are averaged over runs; a run counts for the samples it trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from kdfast.dynamics.reader import Dynamics
from kdfast.errors import DataError, UsageError
from kdfast.pruning.options import Option
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import ScoreInputs, ScoreResult, require_dynamics

FORGETTING_OPTIONS = {
    "never_learned": Option(
        "max",
        "events of a run in which a sample was never correct: one for each epoch, above all others (max, the paper's "
        "code), 0 (zero; CCS, D2, DUAL), or infinitely many, whatever the other runs say (infinite; Data Diet)",
        choices=("max", "zero", "infinite"),
    ),
    "when": Option(
        "epoch",
        "where correctness is measured: after each epoch on all samples without augmentation (epoch), or when the "
        "sample is in a training batch, with augmentation (batch, the paper)",
        choices=("epoch", "batch"),
    ),
}
AUM_OPTIONS = {
    "margin": Option(
        "logit",
        "what to subtract: logits (logit, Pleiss et al.), or probabilities (probability, the code of CCS and D2)",
        choices=("logit", "probability"),
    )
}


# Samples read at a time: 64 MB of float64 at 128 epochs. A multiple of 8, as `Dynamics.correct` needs.
_BLOCK = 1 << 16


def average_by_blocks(dynamics: Dynamics, of_run: Callable[[int, slice], npt.NDArray[np.floating]]) -> FloatArray:
    """Like `average_over_runs`, for values that are computed for a block of samples at a time.

    Args:
        dynamics: The dynamics. Map their arrays for each block anew, so that the pages of a block are released.
        of_run: Return the values of a run for some samples, float (n,).
    """

    def join(run: int) -> FloatArray:
        values = np.empty(dynamics.n)
        for block in sample_blocks(dynamics.n):
            values[block] = of_run(run, block)
        return values

    return average_over_runs(dynamics, join)


def sample_blocks(n: int, size: int = _BLOCK) -> Iterator[slice]:
    """Yield blocks of consecutive samples, all of about the same size.

    No block of more samples than one has a single sample: numpy sums one column of epochs in another order.
    """
    count = -(-n // size)
    edges = [min(n, -(-n * block // count) // 8 * 8) for block in range(count)]
    for start, stop in zip(edges, [*edges[1:], n], strict=True):
        yield slice(start, stop)


def average_over_runs(dynamics: Dynamics, of_run: Callable[[int], npt.NDArray[np.floating]]) -> FloatArray:
    """Average values over runs, each run for the samples it trained on.

    Args:
        dynamics: The dynamics.
        of_run: Return the values of a run, float (N,).

    Returns:
        float64 (N,).

    Raises:
        DataError: No run trained on some sample.
    """
    total, count = np.zeros(dynamics.n), np.zeros(dynamics.n)
    for run in range(dynamics.runs):
        trained = dynamics.mask(run)
        total[trained] += of_run(run)[trained]
        count += trained
    if not count.all():
        missing = np.flatnonzero(count == 0)
        raise DataError(
            f"no run of {dynamics.path} trained on {len(missing)} of {dynamics.n} samples (for example {missing[0]}); "
            "record again with kdfast dynamics: more runs, or a larger share of the training split per run"
        )
    return total / count


def forgetting(inputs: ScoreInputs) -> ScoreResult:
    """Number of epochs at which a sample is wrong that was correct one epoch earlier; mean over runs.

    The paper measures correctness in the training batches: `when=batch`, for dynamics that were recorded so.

    Samples that were never correct were never forgotten either. The paper ranks them as forgotten infinitely often; its
    code counts E events for such a run, more than E epochs can hold, and so does `never_learned=max`. The codes of CCS,
    D2 and DUAL count 0, so that they are pruned first (`zero`). Data Diet's code counts infinitely many before it
    averages over runs, so that a sample which any run never learned ranks above all others: `infinite`, as the score E.

    Source:
        Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network Learning, ICLR 2019.
    """
    dynamics = require_dynamics(inputs, "forgetting")
    if dynamics.epochs < 2:
        raise UsageError(
            f"forgetting compares epochs, but {dynamics.path} has only one: record more with kdfast dynamics"
        )
    never_learned, when = (str(inputs.options[name]) for name in ("never_learned", "when"))
    events_if_never = {"max": float(dynamics.epochs), "zero": 0.0, "infinite": np.inf}[never_learned]

    def events(run: int, samples: slice) -> FloatArray:
        correct = dynamics.correct(run, when=when, samples=samples)
        count: FloatArray = (correct[:-1] & ~correct[1:]).sum(axis=0).astype(np.float64)
        count[~correct.any(axis=0)] = events_if_never
        return count

    mean = average_by_blocks(dynamics, events)
    return ScoreResult(np.where(np.isinf(mean), dynamics.epochs, mean))


def aum(inputs: ScoreInputs) -> ScoreResult:
    """Minus the area under the margin: the mean over epochs of (largest other logit - logit of the label).

    `margin=probability` subtracts probabilities instead. They bound a sample's share of each epoch to 1, so the two
    rank confidently learned samples differently.

    Source:
        Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking, NeurIPS 2020, equation 1.
        Zheng et al., Coverage-centric Coreset Selection for High Pruning Rates, ICLR 2023, divide it into strata; their
        code, and that of D2, accumulates probability margins.
    """
    dynamics = require_dynamics(inputs, "aum")
    of_logits = inputs.options["margin"] == "logit"

    def area(run: int, samples: slice) -> FloatArray:
        if of_logits:
            margin: FloatArray = dynamics.margin(run)[:, samples].mean(axis=0, dtype=np.float64)
        else:
            both = (dynamics.p_y(run), dynamics.p_other(run))
            p_y, p_other = (p[:, samples].mean(axis=0, dtype=np.float64) for p in both)
            margin = p_y - p_other
        return -margin

    return ScoreResult(average_by_blocks(dynamics, area))
