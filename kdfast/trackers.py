"""Trackers of experiments: packages that collect the metrics of runs. Each is optional and imported when it is used.

To add one, write a class with the methods of `Tracker` and an entry in TRACKERS.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from kdfast.errors import DataError, DataWarning, KdfastError, OutputError, UsageError, did_you_mean
from kdfast.files import read_json, refuse_links, write_json

PROJECT = "kdfast"
"""Project, or experiment, of all runs."""

STATE = "trackers.json"
"""File of a run's folder with the name that each tracker gave to the run, by which it continues there."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run.

    Attributes:
        folder: The run's folder.
        settings: Its settings, JSON values.
        identifier: The tracker's own name of the run if it continues one, else None.
    """

    folder: Path
    settings: Mapping[str, Any]
    identifier: str | None = None


class Tracker(Protocol):
    """Collects the metrics of one run."""

    identifier: str | None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Collect values of a step."""

    def close(self, *, failed: bool) -> None:
        """Write what is left; `failed` tells that the run stopped before its end."""


class TensorBoard:
    """Event files in the folder `tensorboard` of the run.

    Args:
        package: `torch.utils.tensorboard`.
        run: The run.
    """

    identifier: str | None = None

    def __init__(self, package: Any, run: TrackedRun) -> None:
        self._writer = package.SummaryWriter(str(refuse_links(run.folder, "tensorboard")))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a scalar for each value."""
        for name in sorted(values):
            self._writer.add_scalar(name, values[name], step)

    def close(self, *, failed: bool) -> None:
        """Close the files."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; the environment variable WANDB_MODE decides whether it is online.

    Args:
        package: `wandb`.
        run: The run.
    """

    def __init__(self, package: Any, run: TrackedRun) -> None:
        self._run = package.init(
            project=PROJECT,
            name=run.folder.name,
            dir=str(run.folder),
            config=dict(run.settings),
            id=run.identifier,
            resume="allow",
        )
        self.identifier: str | None = str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values at this step."""
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow; the environment variable MLFLOW_TRACKING_URI says where.

    Args:
        package: `mlflow`.
        run: The run.
    """

    def __init__(self, package: Any, run: TrackedRun) -> None:
        self._mlflow = package
        package.set_experiment(PROJECT)
        if run.identifier is None:
            started = package.start_run(run_name=run.folder.name)
            package.log_params({name: json.dumps(value) for name, value in run.settings.items()})
        else:
            started = package.start_run(run_id=run.identifier)
        self.identifier: str | None = str(started.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values at this step."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """End the run."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class Trackio:
    """A run of Trackio.

    Args:
        package: `trackio`.
        run: The run.
    """

    def __init__(self, package: Any, run: TrackedRun) -> None:
        self._trackio = package
        # Runs of one name are one run, and different folders often have one name.
        self.identifier: str | None = run.identifier or f"{run.folder.name}-{uuid.uuid4().hex[:8]}"
        resume = "never" if run.identifier is None else "allow"
        package.init(project=PROJECT, name=self.identifier, config=dict(run.settings), resume=resume)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values at this step."""
        self._trackio.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """Finish the run."""
        self._trackio.finish()


@dataclass(frozen=True)
class TrackerKind:
    """A kind of tracker: its class, the module that it needs, and the package to install for it."""

    make: Callable[[Any, TrackedRun], Tracker]
    module: str
    package: str


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind(TensorBoard, "torch.utils.tensorboard", "tensorboard"),
    "wandb": TrackerKind(WeightsAndBiases, "wandb", "wandb"),
    "mlflow": TrackerKind(MLflow, "mlflow", "mlflow"),
    "trackio": TrackerKind(Trackio, "trackio", "trackio"),
}
"""Name -> kind of tracker."""


class TrackerSet:
    """The trackers of a run, of which the packages are loaded; nothing is written before `started`.

    Args:
        names: Names of TRACKERS; repeated ones count once.

    Raises:
        UsageError: There is no such tracker, or its package is missing or does not work.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._packages = {name: _load(name) for name in dict.fromkeys(names)}

    @contextlib.contextmanager
    def started(self, folder: Path, settings: Mapping[str, Any]) -> Iterator[list[Tracker]]:
        """Start or continue the trackers for the run of a folder, and close them at the end.

        Args:
            folder: The run's folder, claimed.
            settings: The run's settings, JSON values.

        Raises:
            OutputError: A tracker cannot start the run.
        """
        if not self._packages:
            yield []
            return
        identifiers = _read_identifiers(folder)
        trackers: list[Tracker] = []
        failed = True
        try:
            for name, package in self._packages.items():
                run = TrackedRun(folder, settings, identifiers.get(name))
                trackers.append(_Guarded(name, _start(name, package, run)))
                identifiers[name] = trackers[-1].identifier
            write_json(folder / STATE, identifiers)
            yield trackers
            failed = False
        finally:
            for tracker in trackers:
                tracker.close(failed=failed)


class _Guarded:
    """A tracker whose failure does not end the training, such as that of a server: it is said once.

    Args:
        name: Its name.
        tracker: The tracker.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker, self._works = name, tracker, True
        self.identifier = tracker.identifier

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the values on, unless it has failed before."""
        if self._works:
            with self._failing():
                self._tracker.log(step, values)

    def close(self, *, failed: bool) -> None:
        """Close the tracker."""
        with self._failing():
            self._tracker.close(failed=failed)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            with _off_stdout():
                yield
        except Exception as error:
            if self._works:
                text = (
                    f"{self._name} gets no more metrics, it failed: {_first_line(error)}; metrics.jsonl has all of them"
                )
                warnings.warn(text, DataWarning, stacklevel=2)
            self._works = False


def _start(name: str, package: Any, run: TrackedRun) -> Tracker:
    try:
        with _off_stdout():
            return TRACKERS[name].make(package, run)
    except KdfastError:
        raise
    except Exception as error:
        raise OutputError(f"`track` {name}: it cannot start a run: {_first_line(error)}") from error


def _off_stdout() -> contextlib.redirect_stdout[TextIO]:
    """Return a context in which packages that print links write to the standard error: the other one is for results."""
    return contextlib.redirect_stdout(sys.stderr)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _load(name: str) -> Any:
    if name not in TRACKERS:
        raise UsageError(f"`track` is {name!r}: {did_you_mean(name, TRACKERS)}pass one of {', '.join(TRACKERS)}")
    kind = TRACKERS[name]
    try:
        return importlib.import_module(kind.module)
    except ImportError as error:
        raise UsageError(f"`track` {name} needs a missing package: pip install {kind.package}") from error
    except Exception as error:
        raise UsageError(
            f"`track` {name}: the installed {kind.package} does not work ({error}): install another version"
        ) from error


def _read_identifiers(folder: Path) -> dict[str, Any]:
    """Return the names that trackers gave to the run of a folder, by the trackers' names."""
    try:
        found = read_json(folder / STATE)
    except DataError:
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
