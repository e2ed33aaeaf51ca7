"""The settings of an engine: where the workers of a sweep or a study run, and what each of them gets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kdfast.device import resolve_device
from kdfast.errors import UsageError, did_you_mean

LOCAL, RAY, SLURM = ENGINES = ("local", "ray", "slurm")

# Options of Slurm that give a job GPUs.
_SLURM_GPUS = ("gres", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket")
# Options of Slurm that the engine sets.
_SLURM_OWN = ("array", "chdir", "error", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "signal")


@dataclass(frozen=True)
class EngineConfig:
    """Where workers run.

    Attributes:
        name: One of `ENGINES`: in processes or threads of this machine, on a Ray cluster, or in jobs of Slurm.
        device: Where the workers train: `cpu`, `cuda` or, on this machine, `cuda:N`.
        ray_address: Address of the Ray cluster: HOST:PORT; `auto`, the one that this machine belongs to; or `local`, a
            new one of this machine alone.
        cpus: CPU cores of each worker on a cluster, and its threads.
        gpus: GPUs of each worker on a cluster; with Ray it may be a share of one.
        slurm_options: Options of sbatch, without the dashes before them.
    """

    name: str = LOCAL
    device: str = "cpu"
    ray_address: str = "auto"
    cpus: int = 1
    gpus: float = 0
    slurm_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def device_here(self) -> str:
        """Where this process opens the inputs, on a machine that may have no GPU."""
        return self.device if self.name == LOCAL else "cpu"


def choose_engine(
    name: str,
    device: str,
    *,
    ray_address: str | None = None,
    cpus_per_job: int | None = None,
    gpus_per_job: float | None = None,
    slurm_options: Mapping[str, str] | None = None,
) -> EngineConfig:
    """Check the settings of an engine together and fill in those that are not given.

    Args:
        name: One of `ENGINES`.
        device: Where to train, see `kdfast.device.resolve_device`. On a cluster, `auto` is a GPU if each worker gets
            one, and each gets one if this machine has any.
        ray_address: As in `EngineConfig`; default: `auto`.
        cpus_per_job: As `EngineConfig.cpus`; default: 1.
        gpus_per_job: As `EngineConfig.gpus`; default: 1 where the workers train on a GPU, unless `slurm_options` say
            more.
        slurm_options: As in `EngineConfig`.

    Raises:
        UsageError: A setting is wrong, missing, or belongs to another engine.
    """
    options = dict(slurm_options or {})
    if name not in ENGINES:
        raise UsageError(f"`engine` is {name!r}: {did_you_mean(name, ENGINES)}pass one of {', '.join(ENGINES)}")
    given = {"ray_address": (ray_address, (RAY,)), "slurm_option": (options or None, (SLURM,)),
             "cpus_per_job": (cpus_per_job, (RAY, SLURM)), "gpus_per_job": (gpus_per_job, (RAY, SLURM))}  # fmt: skip
    for setting, (value, engines) in given.items():
        if value is not None and name not in engines:
            raise UsageError(f"`engine` is {name}, and `{setting}` is for {' and '.join(engines)}: omit one of them")
    if name == LOCAL:
        return EngineConfig(name, str(resolve_device(device)))
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"`device` is {device!r}, and the engine {name} assigns the GPUs: pass auto, cpu or cuda")
    _check_slurm(options)
    if name == SLURM and "time" not in options:
        raise UsageError("`engine` is slurm, whose jobs need a time limit: pass `slurm_option` time=4:00:00 or another")
    address = _check_address(ray_address or "auto")
    named = any(option in options for option in _SLURM_GPUS)
    if device == "auto":
        wanted = named if gpus_per_job is None else named or gpus_per_job > 0
        device = "cuda" if wanted or (gpus_per_job is None and resolve_device("auto").type == "cuda") else "cpu"
    gpus = _check_gpus(name, device, gpus_per_job, named)
    return EngineConfig(name, device, address, cpus_per_job or 1, gpus, options)


def _check_address(address: str) -> str:
    if address not in ("auto", "local") and not re.fullmatch(r"[^\s/:]+:\d{1,5}|\[[^\s/\]]+\]:\d{1,5}", address):
        raise UsageError(f"`ray_address` is {address!r}: pass auto, local or HOST:PORT, as ray start --head prints")
    return address


def _check_gpus(name: str, device: str, given: float | None, named: bool) -> float:
    """Return the GPUs of each worker; `named`: whether options of Slurm give it some."""
    gpus = (device == "cuda" and not named) if given is None else given
    if gpus == math.inf:
        raise UsageError(f"`gpus_per_job` is {gpus:g}: pass a finite number")
    if gpus > 0 and device == "cpu":
        raise UsageError(f"`gpus_per_job` is {gpus:g}, and `device` is cpu: omit one of them")
    if gpus > 0 and named:
        raise UsageError(f"`gpus_per_job` is {gpus:g}, and a `slurm_option` gives GPUs too: omit one of them")
    if gpus == 0 and device == "cuda" and not named:
        raise UsageError("`device` is cuda, and `gpus_per_job` is 0: raise it, or pass `device` cpu")
    if gpus != int(gpus) and (name == SLURM or gpus > 1):
        wanted = "a whole number" if name == SLURM else "a whole number, or a share of one GPU"
        raise UsageError(f"`gpus_per_job` is {gpus:g}: pass {wanted}")
    return float(gpus)


def _check_slurm(options: Mapping[str, str]) -> None:
    for option in options:
        if option == "cpus-per-task":
            raise UsageError("`slurm_option` sets cpus-per-task: pass `cpus_per_job` instead, which sets threads too")
        if option in _SLURM_OWN:
            raise UsageError(f"`slurm_option` sets {option}, which the engine sets itself: omit it")
        if not re.fullmatch(r"[a-z][a-z-]*", option):
            raise UsageError(f"`slurm_option` is {option!r}: pass a long option of sbatch, such as partition=gpu")
