"""The IF-Beta method: score and rank the samples, search for (a, b), and draw the subset."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdfast.data.arrays import as_labels
from kdfast.data.holdout import hold_out
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import subset_size
from kdfast.errors import DataError, UsageError, look_up, unknown_name
from kdfast.ops.float32 import full_float32
from kdfast.progress import Progress
from kdfast.pruning.if_beta.checkpoint import START_OVER, SearchCheckpoint, digest
from kdfast.pruning.if_beta.estimators import ESTIMATORS, Estimator, Outcome, Trial
from kdfast.pruning.if_beta.evaluator import PairedComparison, PolicyEvaluator
from kdfast.pruning.if_beta.inputs import as_tensor, check_fraction, check_inputs, check_scores
from kdfast.pruning.if_beta.policy import StratifiedSampler, average_ranks
from kdfast.pruning.if_beta.proxy import PROXIES, Proxy, ProxyData, ProxyTrainingConfig
from kdfast.pruning.if_beta.reward import REWARDS, Reward
from kdfast.pruning.if_beta.scores import SAMPLE_SCORES, HeadInputs, SampleScore
from kdfast.pruning.if_beta.search import Schedule, SearchState
from kdfast.pruning.if_beta.stages import TwoStages
from kdfast.pruning.rules.base import FloatArray

Balance: TypeAlias = Literal["balanced", "equal", "unbalanced"]

_PARTS = ("score", "proxy", "reward", "estimator")
# Step index of the final draws' noise, above any search step.
_FINAL = 1 << 20


@dataclass(frozen=True)
class IFBetaResult:
    """Result of `IFBeta.fit`.

    Attributes:
        ids: int64 (m,), indices of the samples to keep, ascending.
        a: First parameter of the policy that drew `ids`: the learned one, or with a `Schedule` 1 if the learned policy
            does not beat the uniform policy on the proxies at the 95% level.
        b: Second parameter, likewise.
        learned: (a, b) as learned.
        u: float64 (N,), rank of each sample in (0, 1), within its class if draws are by class.
        scores: float64 (N,), the scores behind the ranks.
        path: (a, b) before each step, then the final (a, b).
        rewards: Mean reward of each step.
        accuracies: Mean held-out accuracy of the proxies of each step.
        gain: The learned policy compared with the uniform one on the proxies.
        trials: Number of proxies trained during the search.
        held_out: Number of held-out samples.
        candidates: Number of final draws, of which the one with the best reward was kept; 1: drawn without evaluation.
        score_seconds: Time of the scores.
        search_seconds: Time of the search, including interrupted calls.
    """

    ids: IntArray
    a: float
    b: float
    learned: tuple[float, float]
    u: FloatArray
    scores: FloatArray
    path: list[list[float]]
    rewards: list[float]
    accuracies: list[float]
    gain: PairedComparison
    trials: int
    held_out: int
    candidates: int
    score_seconds: float
    search_seconds: float

    @property
    def seconds(self) -> float:
        """Time of the scores and the search."""
        return self.score_seconds + self.search_seconds


@dataclass(frozen=True)
class IFBeta:
    """A learned sampling policy with pluggable components.

    Attributes:
        score: A key of `SAMPLE_SCORES`, or a function from `HeadInputs` to float64 (N,).
        proxy: A key of `PROXIES`, or a `Proxy`.
        reward: A key of `REWARDS`, or a `Reward`.
        estimator: A key of `ESTIMATORS`, or an `Estimator`.
        budget: Training settings of the proxies.
        schedule: Settings of the search over (a, b): a `Schedule`, or the published `TwoStages`.
        balance: `balanced` ranks and draws within each class, in proportion to the class sizes; `equal` draws the same
            number from each class; `unbalanced` ranks and draws all samples together.
        held_share: Share of each class to hold out, at least 20 samples but at most half of the class.
        candidates: Number of final draws to select from by reward; 1 keeps the first.
    """

    score: str | SampleScore = "self"
    proxy: str | Proxy = "projection"
    reward: str | Reward = "kd"
    estimator: str | Estimator = "crn"
    budget: ProxyTrainingConfig = field(default_factory=ProxyTrainingConfig)
    schedule: Schedule | TwoStages = field(default_factory=Schedule)
    balance: Balance = "balanced"
    held_share: float = 0.05
    candidates: int = 1

    def __post_init__(self) -> None:
        if self.balance not in get_args(Balance):
            raise unknown_name("no balance is named", self.balance, get_args(Balance))
        if not 0 < self.held_share <= 0.5 or self.candidates < 1:
            raise UsageError(
                f"`held_share` is {self.held_share} and `candidates` {self.candidates}: pass a share in (0, 0.5] and "
                "at least one candidate"
            )

    @full_float32()
    def fit(
        self,
        logits: Tensor | NDArray[np.floating[Any]],
        features: Tensor | NDArray[np.floating[Any]],
        labels: ArrayLike,
        fraction: float,
        seed: int = 0,
        *,
        score_logits: Tensor | NDArray[np.floating[Any]] | None = None,
        scores: ArrayLike | None = None,
        rows: IntArray | None = None,
        state: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        device: torch.device | str = "cpu",
    ) -> IFBetaResult:
        """Learn (a, b) for one fraction and draw the subset.

        Args:
            logits: Floats (N, C), the teacher's logits of all training samples, or of `rows`; converted to float32, as
                all tensors.
            features: Floats (N, D), inputs of the teacher's last layer.
            labels: Integers (N,), classes in [0, C).
            fraction: Share to keep, above 0 and below 1.
            seed: Seed of the held-out set, the projections, and all noise.
            score_logits: Floats (N, C), logits for the scores only, such as `mean_logits` of several views; None:
                `logits`.
            scores: Real numbers (N,), scores to use instead of `score`.
            rows: int64 (n,), ascending: the samples that `logits` and `features` hold, on which the search draws,
                trains and evaluates; ranks and the subset are those of all samples. It needs `scores`, and one
                candidate. None: all samples.
            state: Checkpoint file of the search; a call with the same arguments resumes from it. The file remains after
                the search so that nothing is lost before the result is saved; delete it then.
            progress: Called with (steps done, maximum steps, note) after each step.
            device: Device to compute the scores and to train the proxies on. Draws are made on the CPU.

        Returns:
            The subset, the policy, and the record of the search.

        Raises:
            SubsetError: The fraction is out of range, or leaves a class empty.
            ShapeError: A shape or dtype is wrong.
            DataError: A value is not finite, the labels are no classes, or every class has a single sample.
            UsageError: A part is unknown; `rows` are given without `scores` or with several candidates; or `state` is
                given and a custom part has no identity: it is not a dataclass or a plain function and has no attribute
                `identity`.
            DivergedError: A reward is not finite; the checkpoint holds the last good step.
            OutputError: The checkpoint cannot be written, or belongs to another search.
        """
        check_fraction(fraction)
        labels = as_labels(labels)
        if state is not None:
            self._check_identities()
        if rows is not None and (scores is None or self.candidates > 1):
            raise UsageError(
                f"a search on a sample (`rows`) needs scores of all samples (`scores`) and keeps its first draw, but "
                f"`candidates` is {self.candidates}: pass `scores` and 1 candidate"
            )
        task = self._prepare(logits, features, labels, score_logits, scores, rows, seed, device)
        strata = np.zeros_like(labels) if self.balance == "unbalanced" else labels
        mode: Literal["equal", "proportional"] = "equal" if self.balance == "equal" else "proportional"
        u = average_ranks(task.scores, strata)
        ids = np.arange(len(labels), dtype=np.int64)
        sampler = StratifiedSampler.from_ranks(u, ids, strata, subset_size(len(ids), fraction), mode)
        searched = ids if rows is None else rows
        pool = np.setdiff1d(np.arange(len(searched), dtype=np.int64), task.held_out)
        groups = strata[searched][pool]
        # Without the held-out samples, the fraction may round to fewer samples than there are classes.
        total = max(round(fraction * len(pool)), len(np.unique(groups)))
        pool_sampler = StratifiedSampler.from_ranks(u[searched][pool], pool, groups, total, mode)

        settings = {**self.describe(), "fraction": fraction, "seed": seed, **task.inputs}
        path = None if state is None else Path(state)
        checkpoint = SearchCheckpoint(path, digest(task.identity, fraction), settings)
        found = self._search(task.evaluator, pool_sampler, checkpoint, progress)
        started = time.perf_counter()
        learned = self.schedule.learned(found)
        gain = task.evaluator.compare(pool_sampler, learned, (1.0, 1.0), step=_FINAL)
        a, b = (1.0, 1.0) if self.schedule.keeps_uniform and gain.difference <= gain.half_width else learned
        draws = [sampler.draw(a, b, sampler.gumbel(seed, _FINAL, k)) for k in range(self.candidates)]
        kept = draws[0] if self.candidates == 1 else draws[task.evaluator.select_best(draws, step=_FINAL)]
        return IFBetaResult(
            ids=np.sort(kept),
            a=a,
            b=b,
            learned=learned,
            u=u,
            scores=task.scores,
            path=found.path,
            rewards=found.rewards,
            accuracies=found.accuracies,
            gain=gain,
            trials=found.trials,
            held_out=len(task.held_out),
            candidates=self.candidates,
            score_seconds=task.score_seconds,
            search_seconds=found.seconds + time.perf_counter() - started,
        )

    def describe(self) -> dict[str, Any]:
        """Return all settings as JSON values; they are part of the identity of a search on disk."""
        plain = {"balance": self.balance, "held_share": self.held_share, "candidates": self.candidates}
        return {name: _describe_part(getattr(self, name)) for name in _PARTS} | {
            "budget": asdict(self.budget),
            "schedule": asdict(self.schedule),
            **plain,
        }

    def _check_identities(self) -> None:
        for kind in _PARTS:
            if not _has_identity(part := getattr(self, kind)):
                raise UsageError(
                    f"the {kind} {part!r} has no identity, so its checkpoint cannot be matched to it: add an "
                    "attribute `identity` that names all its settings, or omit `state`"
                )

    def _prepare(
        self,
        logits: Tensor | NDArray[np.floating[Any]],
        features: Tensor | NDArray[np.floating[Any]],
        labels: IntArray,
        score_logits: Tensor | NDArray[np.floating[Any]] | None,
        scores: ArrayLike | None,
        rows: IntArray | None,
        seed: int,
        device: torch.device | str,
    ) -> _Task:
        """Check the inputs, score the samples, and build the evaluator."""
        proxy = look_up(PROXIES, self.proxy, "IF-Beta proxy")() if isinstance(self.proxy, str) else self.proxy
        reward = look_up(REWARDS, self.reward, "IF-Beta reward") if isinstance(self.reward, str) else self.reward
        own = labels if rows is None else labels[rows]
        z, h, y = as_tensor("logits", logits), as_tensor("features", features), torch.tensor(own)
        score_z = z if score_logits is None else as_tensor("score_logits", score_logits)
        check_inputs(z, h, own)
        check_inputs(score_z, h, own)
        held_out = hold_out(own, z.shape[1], share=self.held_share, seed=seed)[1]
        started = time.perf_counter()
        moved_h, moved_y = h.to(device), y.to(device)
        inputs = HeadInputs(score_z.to(device), moved_h, moved_y, held_out, seed)
        values = check_scores(self._compute_scores(inputs) if scores is None else scores, len(labels))
        seconds = time.perf_counter() - started
        data = ProxyData(proxy.transform(moved_h, seed), moved_y, z.to(device))
        evaluator = PolicyEvaluator(proxy, reward, self.budget, data, held_out, seed)
        inputs_digests = {"data": digest(z, h, labels), "scores": digest(values)}
        identity = digest(self.describe(), seed, z, h, labels, values)
        return _Task(values, held_out, evaluator, identity, inputs_digests, seconds)

    def _compute_scores(self, inputs: HeadInputs) -> FloatArray:
        score = look_up(SAMPLE_SCORES, self.score, "IF-Beta score") if isinstance(self.score, str) else self.score
        return score(inputs)

    def _search(
        self,
        evaluator: PolicyEvaluator,
        sampler: StratifiedSampler,
        checkpoint: SearchCheckpoint,
        progress: Progress | None,
    ) -> SearchState:
        estimator = self.estimator
        if isinstance(estimator, str):
            estimator = look_up(ESTIMATORS, estimator, "IF-Beta estimator")()

        def evaluate(trials: Sequence[Trial], step: int) -> list[Outcome]:
            return evaluator.evaluate(trials, sampler=sampler, step=step)

        found = checkpoint.load() or self.schedule.initial()
        if not np.allclose(self.schedule.policy(found.phi), found.path[-1]):
            raise DataError(f"{checkpoint.path}: its phi and the end of its path contradict each other: {START_OVER}")
        while not self.schedule.is_finished(found):
            started = time.perf_counter()
            self.schedule.take_step(found, estimator, evaluate)
            found.seconds += time.perf_counter() - started
            checkpoint.save(found)
            if progress is not None:
                a, b = found.path[-1]
                note = f"reward {found.rewards[-1]:.4f}  a {a:.2f}  b {b:.2f}"
                progress(found.step, self.schedule.total, note)
        return found


@dataclass(frozen=True)
class _Task:
    """Everything that does not depend on the fraction."""

    scores: FloatArray
    held_out: IntArray
    evaluator: PolicyEvaluator
    identity: str
    inputs: dict[str, str]
    score_seconds: float


def _describe_part(part: object) -> str:
    """Return a part's name or identity; dataclasses are described by their fields, functions by their names."""
    if isinstance(part, str):
        return part
    if is_dataclass(part):
        return repr(part)
    name = f"{part.__module__}.{getattr(part, '__qualname__', type(part).__name__)}"
    return f"{name}:{part.identity}" if hasattr(part, "identity") else name


def _has_identity(part: object) -> bool:
    """Return whether `_describe_part` is unique; it is not for closures, lambdas, and objects with hidden settings."""
    if isinstance(part, str) or is_dataclass(part) or hasattr(part, "identity"):
        return True
    return inspect.isfunction(part) and part.__closure__ is None and part.__name__ != "<lambda>"
