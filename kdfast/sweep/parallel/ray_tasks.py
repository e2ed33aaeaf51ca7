"""Workers in tasks of a Ray cluster, which Ray starts again, on another node if need be, when they are killed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from kdfast.errors import KdfastError, UsageError
from kdfast.sweep.parallel.engine import EngineConfig
from kdfast.sweep.parallel.worker import Task, work

# A worker that a fault of the program kills would be killed forever.
_RESTARTS = 3
# How long workers that are asked to stop may take to save their states.
_SAVE_SECONDS = 60.0
_CONNECT_SECONDS = 10.0


class RayTasks:
    """Tasks that each call `kdfast.sweep.parallel.worker.work`. Those for which the cluster has no room wait.

    Args:
        task: What each is given.
        engine: The resources of each. `connect_ray` has connected to its cluster.
        jobs: Number of tasks; None: as many as the cluster has room for.
        most: Most tasks that have work to do, which no number exceeds.
    """

    def __init__(self, task: Task, engine: EngineConfig, jobs: int | None, most: int) -> None:
        self._ray: Any = _import_ray()
        self._errors: list[KdfastError] = []
        self._lost: list[str] = []
        self._engine = engine
        jobs = max(1, min(most, self._room() if jobs is None else jobs))
        remote = self._ray.remote(work).options(
            num_cpus=engine.cpus, num_gpus=engine.gpus, max_retries=_RESTARTS, name="kdfast"
        )
        self._all = self._pending = [remote.remote(task) for _ in range(jobs)]

    def _room(self) -> int:
        """Return how many tasks the machines of the cluster have room for; each needs all of its own on one machine."""
        wanted = {"CPU": self._engine.cpus, "GPU": self._engine.gpus}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(
            math.floor(min(float(node.get(name, 0)) / share for name, share in wanted.items() if share > 0))
            for node in nodes
        )

    def describe(self) -> str:
        """Return how many tasks have not ended, and what they wait for if they can run nowhere."""
        count = "1 worker on Ray" if len(self._pending) == 1 else f"{len(self._pending)} workers on Ray"
        if self._room():
            return count
        gpus = f" and {self._engine.gpus:g} GPUs" if self._engine.gpus else ""
        return f"{count}; waiting: no machine of the cluster has {self._engine.cpus} CPU cores{gpus}"

    def have_ended(self) -> bool:
        """Return whether every task has ended, and keep what they returned."""
        ended, self._pending = self._ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
        for task in ended:
            self._keep(task)
        return not self._pending

    def _keep(self, task: Any) -> None:
        found: KdfastError | None = None
        try:
            found = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:  # a fault of the program, whose text is in its last line
            self._lost.append(str(error).strip().rpartition("\n")[2])
        except self._ray.exceptions.RayError as error:
            self._lost.append(type(error).__name__)
        if found is not None:
            self._errors.append(found)

    def stop(self) -> None:
        """Interrupt the tasks that have not ended, wait until they have saved their states, and leave the cluster."""
        for task in self._pending:
            self._ray.cancel(task)
        if self._pending:
            ended, _ = self._ray.wait(self._pending, num_returns=len(self._pending), timeout=_SAVE_SECONDS)
            for task in ended:
                self._keep(task)
        self._ray.shutdown()

    def errors(self) -> list[KdfastError]:
        """Return the errors of the tasks that have ended."""
        return self._errors

    def lost(self) -> str:
        """Return how tasks ended that Ray did not start again."""
        return ", ".join(self._lost)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError("`engine` is ray, which is not installed: pip install 'kdfast[ray]'") from error
    return ray


def connect_ray(address: str) -> None:
    """Connect this process to a Ray cluster, see `EngineConfig.ray_address`.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster.
    """
    ray = _import_ray()
    host, colon, port = address.rpartition(":")
    if colon:  # Ray tries for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, str(error)) from error
    # Ray prints what it says about killed workers to the standard output, where the result goes.
    ray._private.worker._worker_logs_enabled = False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that starts here reports to nobody
    with _own_signals():
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_cluster(address, str(error).strip().partition("\n")[0].partition(". ")[0]) from error


def _no_cluster(address: str, reason: str) -> UsageError:
    return UsageError(
        f"`ray_address` is {address}, and there is no Ray cluster ({reason}): start one with ray start --head, or pass "
        "the address of its head"
    )


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of this process, which Ray replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
