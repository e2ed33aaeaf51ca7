"""IF-Beta as a whole: scores, ranks, the search over (a, b), and the final draw."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import subset_size
from kdfast.errors import UsageError
from kdfast.prune.if_beta.checkpoint import SideFile
from kdfast.prune.if_beta.evaluator import Arena, Gain
from kdfast.prune.if_beta.gradient import ESTIMATORS, Estimator
from kdfast.prune.if_beta.holdout import hold_out
from kdfast.prune.if_beta.inner import Budget, Lesson
from kdfast.prune.if_beta.inputs import check_fraction, check_inputs, check_scores, digest
from kdfast.prune.if_beta.names import entry
from kdfast.prune.if_beta.policy import Design, FloatArray, average_ranks
from kdfast.prune.if_beta.proxy import PROXIES, Proxy
from kdfast.prune.if_beta.reward import REWARDS, Reward
from kdfast.prune.if_beta.scores import SAMPLE_SCORES, SampleScore, Signals
from kdfast.prune.if_beta.search import Schedule, SearchState, ascend, ended, result_of
from kdfast.prune.rules.registry import BALANCE

Progress = Callable[[int, int, str], None]

# The noise of the final draw; steps of the search count from 0.
_FINAL = 1 << 20


@dataclass(frozen=True)
class IFBetaResult:
    """What a search found.

    Attributes:
        ids: int64 (m,), the samples to keep, ascending.
        a: First parameter of the policy that drew: the learned one, or 1 where that is not better than the uniform
            policy on the proxy beyond chance.
        b: Second parameter, likewise.
        learned: (a, b) as learned.
        u: float64 (N,), rank of each sample in (0, 1), within its class where draws are by class.
        scores: float64 (N,), what is ranked.
        path: (a, b) before each step, and at last where the search ended.
        rewards: Mean reward of each step.
        accuracies: Mean accuracy of the proxies on the held-out part, each step.
        gain: The learned policy against the uniform one, on the proxy.
        trials: Proxies trained during the search.
        held_out: Samples that judged.
        chosen_of: Final draws, the best of which on the held-out part was kept; 1: the first was taken unseen.
        score_seconds: Time that the scores took.
        search_seconds: Time that the search took, earlier calls included.
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
    gain: Gain
    trials: int
    held_out: int
    chosen_of: int
    score_seconds: float
    search_seconds: float

    @property
    def seconds(self) -> float:
        """Scores and search together."""
        return self.score_seconds + self.search_seconds


@dataclass(frozen=True)
class IFBeta:
    """The learned sampling policy; every part can be replaced.

    Attributes:
        score: A key of `SAMPLE_SCORES`, or a function of `Signals` to float64 (N,).
        proxy: A key of `PROXIES`, or a `Proxy`.
        reward: A key of `REWARDS`, or a `Reward`.
        estimator: A key of `ESTIMATORS`, or an `Estimator`.
        budget: How proxies are trained.
        schedule: How (a, b) move.
        balance: `balanced` ranks and draws class by class, in the classes' proportions, `equal` the same number of each
            class, `unbalanced` all samples together.
        held_share: Share of each class that judges; at least 20 samples of it where there are twice as many.
        candidates: Final draws to choose from by their reward; 1 takes the first.
    """

    score: str | SampleScore = "self"
    proxy: str | Proxy = "projection"
    reward: str | Reward = "kd"
    estimator: str | Estimator = "crn"
    budget: Budget = field(default_factory=Budget)
    schedule: Schedule = field(default_factory=Schedule)
    balance: Literal["balanced", "equal", "unbalanced"] = "balanced"
    held_share: float = 0.05
    candidates: int = 1

    def __post_init__(self) -> None:
        entry(dict.fromkeys(BALANCE), self.balance, "balance")
        if not 0 < self.held_share <= 0.5 or self.candidates < 1:
            raise UsageError(
                f"held_share is {self.held_share}, candidates {self.candidates}: a share in (0, 0.5] and at least one "
                "candidate are needed"
            )

    def fit(
        self,
        logits: Tensor | NDArray[np.float32],
        features: Tensor | NDArray[np.float32],
        labels: IntArray,
        fraction: float,
        seed: int = 0,
        *,
        score_logits: Tensor | None = None,
        scores: FloatArray | None = None,
        state: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        device: torch.device | str = "cpu",
    ) -> IFBetaResult:
        """Learn (a, b) for one fraction and draw the subset.

        Args:
            logits: float32 (N, C), the teacher's logits of all training samples.
            features: float32 (N, D), the inputs of its last layer.
            labels: int64 (N,).
            fraction: Share to keep, above 0 and below 1.
            seed: Seed of the held-out part, the projections, and all noise.
            score_logits: float32 (N, C) for the scores only, such as `mean_logits` of several views; None: `logits`.
            scores: float64 (N,) to be used as they are instead of `score`.
            state: File that holds the search while it is under way; a call with the same arguments goes on from it.
                It stays when the search has ended, so that nothing is lost before the result is saved: remove it then.
            progress: Called with (steps done, steps at most, note) after each step.
            device: Where proxies are trained.

        Returns:
            The subset, the policy and how it was found.

        Raises:
            SubsetError: The fraction is out of range, or leaves a class empty.
            ShapeError: Shapes or dtypes do not fit.
            DataError: Something is not finite, or a class is too small to be held out.
            UsageError: A part is unknown; or there is a `state` and a part that replaces one cannot be told from
                others: it has no `identity`, and is neither a dataclass nor a plain function.
            DivergedError: A reward is not finite; the state file holds the last good step.
            OutputError: The state file cannot be written, or is another search's.
        """
        check_fraction(fraction)
        if state is not None:
            self._check_identities()
        task = self._task(logits, features, labels, score_logits, scores, seed, device)
        strata = np.zeros_like(labels) if self.balance == "unbalanced" else labels
        mode: Literal["equal", "proportional"] = "equal" if self.balance == "equal" else "proportional"
        u = average_ranks(task.scores, strata)
        everything = np.arange(len(labels), dtype=np.int64)
        whole = Design.of(u, everything, strata, subset_size(len(labels), fraction), mode)
        pool = np.setdiff1d(everything, task.held)
        within = Design.of(u[pool], pool, strata[pool], subset_size(len(pool), fraction), mode)

        side = SideFile(None if state is None else Path(state), digest(task.identity, fraction))
        found = self._search(task.arena, within, side, progress)
        started = time.perf_counter()
        learned = result_of(found, self.schedule)
        gain = task.arena.compare(within, learned, (1.0, 1.0), step=_FINAL)
        a, b = learned if gain.difference > gain.half_width else (1.0, 1.0)
        draws = [whole.draw(a, b, whole.gumbel(seed, _FINAL, k)) for k in range(self.candidates)]
        ids = draws[0] if self.candidates == 1 else draws[task.arena.best(draws, step=_FINAL)]
        return IFBetaResult(
            ids=np.sort(ids),
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
            held_out=len(task.held),
            chosen_of=self.candidates,
            score_seconds=task.score_seconds,
            search_seconds=found.seconds + time.perf_counter() - started,
        )

    def describe(self) -> dict[str, Any]:
        """All settings, as JSON values."""
        named = {name: getattr(self, name) for name in ("score", "proxy", "reward", "estimator")}
        plain = {"balance": self.balance, "held_share": self.held_share, "candidates": self.candidates}
        return {name: _name(part) for name, part in named.items()} | {
            "budget": asdict(self.budget),
            "schedule": asdict(self.schedule),
            **plain,
        }

    def _check_identities(self) -> None:
        for kind in ("score", "proxy", "reward", "estimator"):
            if not _has_identity(part := getattr(self, kind)):
                raise UsageError(
                    f"the {kind} {part!r} cannot be told from another one, so a saved search could be taken over "
                    "wrongly: give it an attribute `identity` that says all its settings, or fit without state"
                )

    def _task(
        self,
        logits: Tensor | NDArray[np.float32],
        features: Tensor | NDArray[np.float32],
        labels: IntArray,
        score_logits: Tensor | None,
        scores: FloatArray | None,
        seed: int,
        device: torch.device | str,
    ) -> _Task:
        """Check the inputs, score the samples and set the proxies up."""
        score = entry(SAMPLE_SCORES, self.score, "score") if isinstance(self.score, str) else self.score
        proxy = entry(PROXIES, self.proxy, "proxy")() if isinstance(self.proxy, str) else self.proxy
        reward = entry(REWARDS, self.reward, "reward") if isinstance(self.reward, str) else self.reward
        z, h, y = torch.as_tensor(logits), torch.as_tensor(features), torch.from_numpy(labels)
        seen = z if score_logits is None else score_logits
        check_inputs(z, h, labels)
        check_inputs(seen, h, labels)
        held = hold_out(labels, z.shape[1], share=self.held_share, seed=seed)[1]
        started = time.perf_counter()
        values = score(Signals(seen, h, y, held, seed)) if scores is None else scores
        check_scores(values, len(labels))
        seconds = time.perf_counter() - started
        arena = Arena(proxy, reward, self.budget, Lesson(proxy.inputs(h, seed), y, z).to(device), held, seed)
        return _Task(values, held, arena, digest(self.describe(), seed, z, h, labels, values), seconds)

    def _search(self, arena: Arena, design: Design, side: SideFile, progress: Progress | None) -> SearchState:
        estimator = (
            entry(ESTIMATORS, self.estimator, "estimator")() if isinstance(self.estimator, str) else self.estimator
        )
        found = side.load() or SearchState.begin(self.schedule)
        while not ended(found, self.schedule):
            started = time.perf_counter()
            ascend(found, self.schedule, lambda phi, step: estimator(phi, arena.evaluator(design, step)))
            found.seconds += time.perf_counter() - started
            side.save(found)
            if progress is not None:
                a, b = found.path[-1]
                note = f"reward {found.rewards[-1]:.4f}  a {a:.2f}  b {b:.2f}"
                progress(found.step, self.schedule.steps, note)
        return found


@dataclass(frozen=True)
class _Task:
    """What does not depend on the fraction."""

    scores: FloatArray
    held: IntArray
    arena: Arena
    identity: str
    score_seconds: float


def _name(part: object) -> str:
    """A part as written, or what tells it from others: a dataclass by its fields, a function by its name."""
    if isinstance(part, str):
        return part
    if is_dataclass(part):
        return repr(part)
    name = f"{part.__module__}.{getattr(part, '__qualname__', type(part).__name__)}"
    return f"{name}:{part.identity}" if hasattr(part, "identity") else name


def _has_identity(part: object) -> bool:
    """Whether `_name` tells it from every other part: not of a closure, a lambda, or an object with settings inside."""
    if isinstance(part, str) or is_dataclass(part) or hasattr(part, "identity"):
        return True
    return inspect.isfunction(part) and part.__closure__ is None and part.__name__ != "<lambda>"
