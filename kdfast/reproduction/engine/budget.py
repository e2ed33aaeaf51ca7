"""How long runs take on this machine, and which of them still fit into a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdfast.data.source import Source
from kdfast.errors import DataError
from kdfast.estimates import estimate_training
from kdfast.files import read_json
from kdfast.reproduction.engine.machine import describe_machine
from kdfast.reproduction.engine.session import ReproductionSession, StudyRun
from kdfast.sweep.results_log import RUNS, ResultsLog

_STEPS = 20  # of a timing; estimates do not time less


@dataclass(frozen=True)
class RunCost:
    """What a run costs.

    Attributes:
        group: Runs of equal groups have equal speed.
        images: Images that its student is trained on.
        seconds: Estimated seconds of its training, from a short timing.
        before: Estimated seconds of what must be made before it, by the file that is then there.
        folder: Folder of the run, whose state says how much of it is done.
    """

    group: tuple[Any, ...]
    images: int
    seconds: float
    before: dict[Path, float]
    folder: Path


@dataclass(frozen=True)
class Budget:
    """Admits a run if it would end before the deadline; a function of the key of the run.

    Attributes:
        deadline: Seconds since the epoch.
        log: The rows, of which those of this machine show its speed.
        machine: This machine.
        costs: What each run costs, by its key.
    """

    deadline: float
    log: ResultsLog
    machine: dict[str, Any]
    costs: dict[str, RunCost]

    def __call__(self, key: str) -> bool:
        """Return whether a run may begin."""
        return time.time() + self.seconds(key) <= self.deadline

    def seconds(self, key: str) -> float:
        """Return the estimated seconds of a run from now, with what must be made before it."""
        missing = sum(seconds for path, seconds in self.costs[key].before.items() if not path.exists())
        return missing + self.training_seconds(key)

    def training_seconds(self, key: str) -> float:
        """Return the estimated seconds of the rest of a run's own training."""
        cost = self.costs[key]
        rate = measured_rate(self.log.rows(), cost.group, self.machine)
        training = cost.seconds if rate is None else cost.images / rate
        return training * (1 - _done_share(cost.folder))


def make_budget(
    session: ReproductionSession, runs: Sequence[StudyRun], log: ResultsLog, deadline: float, jobs: int = 1
) -> Budget:
    """Return the budget of runs that so many processes share, after timing a few steps of each network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))
    try:
        return Budget(deadline, log, describe_machine(session.device), run_costs(session, runs))
    finally:
        torch.set_num_threads(threads)


def run_costs(session: ReproductionSession, runs: Sequence[StudyRun]) -> dict[str, RunCost]:
    """Return what each run costs, by its key."""
    timing = Timing(session.source, session.device, session.config.precision)
    costs = {}
    for run in runs:
        kept = round(run.cell.fraction * len(session.source.train))
        images, online = kept * run.epochs, run.targets is not None and run.targets != "cache"
        seconds = images * timing.step(run.cell.student)
        if online:
            seconds += images * timing.forward(str(run.cell.teacher))
        before = {
            path: trained * timing.step(net) + classified * timing.forward(net)
            for path, (net, trained, classified) in session.missing(run).items()
        }
        group = group_of(run.cell.to_dict(), run.targets, session.config.precision)
        costs[run.key] = RunCost(group, images, seconds, before, session.config.out / RUNS / run.key[:16])
    return costs


def group_of(cell: Mapping[str, Any], targets: str | None, precision: str) -> tuple[Any, ...]:
    """Return what determines the speed of a run: networks, where the logits come from, the term, and the precision."""
    teacher = cell.get("teacher") if targets not in (None, "cache") else None
    return cell["student"], teacher, targets, cell.get("term"), cell["recipe"]["batch_size"], precision


def measured_rate(
    rows: Sequence[Mapping[str, Any]], group: tuple[Any, ...], machine: Mapping[str, Any]
) -> float | None:
    """Return the images per second of the last run of a group on this machine; None if there is none."""
    for row in reversed(rows):
        same = row.get("machine") == machine and row.get("seconds")
        if same and group_of(row["cell"], row["targets"], row["precision"]) == group:
            return float(row["images"] / row["seconds"])
    return None


class Timing:
    """Seconds per image of networks on this machine, timed once each.

    Args:
        source: The data, for the size of the images.
        device: Where to compute.
        precision: Arithmetic of the networks.
    """

    def __init__(self, source: Source, device: torch.device, precision: str) -> None:
        self._source, self._device, self._precision = source, device, precision
        self._known: dict[str, tuple[float, float]] = {}

    def step(self, net: str) -> float:
        """Return the seconds of a training step for each image."""
        return self._time(net)[0]

    def forward(self, net: str) -> float:
        """Return the seconds of a forward pass for each image."""
        return self._time(net)[1]

    def _time(self, net: str) -> tuple[float, float]:
        if net not in self._known:
            batch = 64
            time_of: Callable[[int], float | None] = lambda forwards: estimate_training(  # noqa: E731
                net,
                self._source,
                self._device,
                precision=self._precision,
                steps=_STEPS,
                batch_size=batch,
                forwards=forwards,
            )
            images = _STEPS * batch
            training, both = time_of(0) or 0.0, time_of(images) or 0.0
            self._known[net] = training / images, max(0.0, both - training) / images
        return self._known[net]


def _done_share(folder: Path) -> float:
    try:
        status = read_json(folder / "status.json")
        return float(status["step"] / status["steps"])
    except (DataError, KeyError, TypeError, ZeroDivisionError):
        return 0.0
