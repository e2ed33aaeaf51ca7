"""Training: images per second with cached, online and no teacher, and what one step launches.

A rate is that of whole epochs of kdfast's training loop, after the first ones, which compile, tune and capture. Cached
and plain runs alternate. The profile counts calls of the CUDA runtime and the time of each kernel over one epoch.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.data import TrainingData, training_data
from gpu.results import PartResults, measure_missing
from kdfast.device import resolve_device
from kdfast.distillation.config import Execution, RunConfig
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.inputs import InputPaths, plan_run
from kdfast.distillation.losses.alpha import compute_alpha
from kdfast.distillation.plan import Plan
from kdfast.distillation.train import Monitoring, train

# Networks, batch sizes, and the epochs before and during a timing.
_SETTINGS = {
    "cuda": [("resnet32", 128), ("resnet32", 512), ("resnet32", 64), ("resnet18", 128), ("resnet18", 512)],
    "cpu": [("resnet8", 64)],
}
_WARM = {"cuda": 3, "cpu": 1}
_TIMED = {"cuda": 8, "cpu": 1}
_PRECISION = {"cuda": "bf16", "cpu": "fp32"}
_ROUNDS = 2
_KERNELS = 15  # of which a profile keeps the time
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_LAUNCHES = ("LaunchKernel", "GraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass(frozen=True)
class Setting:
    """Network, batch size, and how the steps run."""

    net: str
    batch: int
    execution: Execution = field(default_factory=Execution)

    @property
    def key(self) -> str:
        """Name of the row."""
        compiled = " compiled" if self.execution.compile else ""
        return f"{self.net} B={self.batch}{compiled}{'' if self.execution.cuda_graph else ' without graph'}"


def settings(device: str) -> list[Setting]:
    """Return the networks with their batch sizes."""
    return [Setting(net, batch) for net, batch in _SETTINGS[device]]


def make_plan(data: TrainingData, setting: Setting, teacher: str, epochs: int, device: str) -> Plan:
    """Plan a run with a `cached`, `online` or no (`plain`) teacher."""
    paths = {"cached": {"cache": data.cache}, "online": {"teacher": data.teacher}, "plain": {}}[teacher]
    config = RunConfig(
        setting.net, epochs=epochs, batch_size=setting.batch, views=0, precision=_PRECISION[device],
        alpha=0.0 if teacher == "plain" else compute_alpha(data.fraction),
    )  # fmt: skip
    return plan_run(
        InputPaths(data.data, loader="resident", **paths),
        config,
        device=resolve_device(device),
        execution=setting.execution,
    )


def run_epochs(plan: Plan, on_epoch: Callable[[int], None]) -> None:
    """Train a plan in a folder of its own, and call a function with the number of epochs done after each."""
    path = Path(os.environ["QUEUE_WORK"]) / "timed-run"
    shutil.rmtree(path, ignore_errors=True)
    done = iter(range(1, plan.config.epochs + 1))
    with RunFolder(path, plan.identity) as folder:
        train(plan, folder, Monitoring(on_epoch_end=lambda _trainer: on_epoch(next(done))))
    shutil.rmtree(path)


def wait(device: str) -> float:
    """Return the time once the device has nothing to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def images_per_second(data: TrainingData, setting: Setting, teacher: str, device: str) -> float:
    """Return the rate with a kind of teacher."""
    return timed_epochs(make_plan(data, setting, teacher, _WARM[device] + _TIMED[device], device), device)


def timed_epochs(plan: Plan, device: str) -> float:
    """Return the images per second of the epochs of a plan after the first ones."""
    warm, timed = _WARM[device], _TIMED[device]
    marks: dict[int, float] = {}

    def mark(epochs: int) -> None:
        if epochs in (warm, warm + timed):
            marks[epochs] = wait(device)

    run_epochs(plan, mark)
    return len(plan.ids) * timed / (marks[warm + timed] - marks[warm])


def rates(data: TrainingData, setting: Setting, device: str) -> dict[str, Any]:
    """Return the rates with each kind of teacher, and how much longer an epoch takes with it."""
    order = ["cached", "plain"] * _ROUNDS + ["online"]
    found: dict[str, list[float]] = {"cached": [], "plain": [], "online": []}
    for teacher in order:
        found[teacher].append(images_per_second(data, setting, teacher, device))
    plain = statistics.median(found["plain"])
    return {
        "precision": _PRECISION[device],
        "data": data.name,
        "images_per_second": found,
        "cached": statistics.median(found["cached"]),
        "cached_to_plain": plain / statistics.median(found["cached"]),
        "online_to_plain": plain / found["online"][0],
    }


def rates_of_any_algorithm(data: TrainingData, setting: Setting, device: str) -> dict[str, Any]:
    """Return the rate with the convolutions that cuDNN finds fastest, not only deterministic ones."""
    cudnn = torch.backends.cudnn
    plan = make_plan(data, setting, "cached", _WARM[device] + _TIMED[device], device)
    cudnn.deterministic, cudnn.benchmark = False, True
    try:
        return {"cached": [timed_epochs(plan, device) for _ in range(_ROUNDS)]}
    finally:
        cudnn.deterministic, cudnn.benchmark = True, False


def profiled(data: TrainingData, setting: Setting, device: str) -> dict[str, Any]:
    """Return what a step of an epoch calls, and the kernels that take the longest, in microseconds a step."""
    warm = _WARM[device]
    plan = make_plan(data, setting, "cached", warm + 2, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    # A profiler that starts after the capture of a graph may miss its kernels, unless one ran before.
    with profile(activities=activities):
        torch.zeros(1, device=device).add_(1)
    profiler = profile(activities=activities)
    marks: list[float] = []

    def mark(epochs: int) -> None:
        if epochs == warm:
            wait(device)
            profiler.start()
        if epochs in (warm, warm + 1):
            marks.append(wait(device))
        if epochs == warm + 1:
            profiler.stop()

    run_epochs(plan, mark)
    steps = -(-len(plan.ids) // setting.batch)
    return {"steps": steps, "microseconds": (marks[1] - marks[0]) / steps * 1e6, **summary(profiler, steps, device)}


def summary(profiler: profile, steps: int, device: str) -> dict[str, Any]:
    """Return the calls and kernels of a profile, each per step."""
    calls: Counter[str] = Counter()
    kernels: dict[str, list[float]] = {}
    for event in profiler.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device or (device == "cpu" and event.self_cpu_time_total > 0):
            spent = event.self_device_time_total if on_device else event.self_cpu_time_total
            kernels[event.key[:120]] = [spent / steps, event.count / steps]
        if not on_device:
            calls[event.key] += event.count
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:_KERNELS]
    return {
        "launches": sum(count for name, count in calls.items() if any(part in name for part in _LAUNCHES)) / steps,
        "waits": sum(calls[name] for name in _WAITS) / steps,
        "calls": {name: count / steps for name, count in calls.items() if name.startswith("cu")},
        "kernels": sum(count for _, count in kernels.values()),
        "kernel_microseconds": sum(spent for spent, _ in kernels.values()),
        "longest": {name: {"microseconds": spent, "count": count} for name, (spent, count) in longest},
    }


def main() -> None:
    """Measure the cases without a row."""
    results = PartResults.from_environment()
    device, data = results.device, training_data(results.device)
    plain = settings(device)
    first = plain[0]
    uncaptured = replace(first, execution=Execution(cuda_graph=False))
    cases: dict[str, Callable[[], dict[str, Any]]] = {each.key: partial(rates, data, each, device) for each in plain}
    cases |= {f"profile {each.key}": partial(profiled, data, each, device) for each in (first, uncaptured)}
    for each in plain if device == "cuda" else ():
        # On a CPU torch.compile takes longer than the whole queue.
        compiled = replace(each, execution=Execution(compile=True))
        cases[f"{each.key} any algorithm"] = partial(rates_of_any_algorithm, data, each, device)
        cases[compiled.key] = partial(rates, data, compiled, device)
        cases |= {f"profile {each.key}": partial(profiled, data, each, device) for each in (compiled, each)}
    measure_missing(results, cases)


if __name__ == "__main__":
    main()
