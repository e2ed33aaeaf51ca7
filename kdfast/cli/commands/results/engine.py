"""Options of the engine that runs a sweep or a study: how many runs train at a time, and where."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from kdfast.cli import options
from kdfast.errors import UsageError

if TYPE_CHECKING:
    from kdfast.sweep.parallel.engine import EngineConfig

_MOST_JOBS = 1024

Jobs = Annotated[
    str,
    typer.Option(
        "--jobs",
        help="Runs that train at a time: in processes on a CPU, in one process on a GPU, in workers on a cluster. "
        "auto: one for each thread of the CPU, four on a GPU, as many as a Ray cluster has room for.",
        metavar="NUMBER|auto",
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        help="Where they train: on this machine, on a Ray cluster, or in jobs of Slurm. All machines must see the data "
        "and --out at the same paths.",
        metavar="local|ray|slurm",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="The Ray cluster: its head; auto, the one that this machine belongs to; or local, a new one of this "
        "machine alone. Default: auto.",
        metavar="HOST:PORT|auto|local",
    ),
]
CpusPerJob = Annotated[
    int | None,
    typer.Option("--cpus-per-job", help="CPU cores and threads of each worker on a cluster. Default: 1.", min=1),
]
GpusPerJob = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-job",
        help="GPUs of each worker on a cluster; with Ray it may be a share, so that several train on one. Default: 1 "
        "with --device cuda, or where this machine has a GPU, else 0.",
        min=0,
    ),
]
SlurmOption = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm-option",
        help="Option of sbatch for the jobs, such as time=4:00:00, which is needed, or partition=gpu; repeatable.",
        metavar="NAME=VALUE",
    ),
]


def parse_jobs(text: str, engine: EngineConfig) -> int | None:
    """Return the runs at a time; None for `auto`.

    Raises:
        UsageError: It is neither a number nor `auto`, or the engine needs a number.
    """
    if text == "auto" and engine.name != "slurm":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_JOBS:
        auto = "" if engine.name == "slurm" else ", or auto"
        raise UsageError(f"--jobs is {text!r}: pass a number from 1 to {_MOST_JOBS}{auto}")
    return int(text)


def parse_engine(
    name: str,
    device: str,
    ray_address: str | None,
    cpus_per_job: int | None,
    gpus_per_job: float | None,
    slurm_option: Iterable[str] | None,
) -> EngineConfig:
    """Return the engine of the options.

    Raises:
        UsageError: An option is wrong, missing, or belongs to another engine.
    """
    from kdfast.sweep.parallel.engine import choose_engine

    chosen: dict[str, str] = {}
    for text in slurm_option or ():
        option, equals, value = text.partition("=")
        if not (option and equals and value) or option in chosen:
            raise UsageError(f"--slurm-option is {text!r}: pass NAME=VALUE, each name once")
        chosen[option] = value
    return choose_engine(
        name, device, ray_address=ray_address, cpus_per_job=cpus_per_job, gpus_per_job=gpus_per_job,
        slurm_options=chosen,
    )  # fmt: skip


def prepare(engine: EngineConfig, dry_run: bool) -> None:
    """Connect to the cluster of an engine, if the command will use it.

    Raises:
        UsageError: There is none.
    """
    if engine.name != "local" and not dry_run:
        from kdfast.sweep.parallel.run import prepare_engine

        prepare_engine(engine)


def choose_precision(precision: str, engine: EngineConfig) -> str:
    """Return the precision to train with where the engine trains, see `options.choose_precision`.

    Raises:
        UsageError: It is `auto`, which other machines may decide otherwise.
    """
    if engine.name == "local":
        from kdfast.device import resolve_device

        return options.choose_precision(precision, resolve_device(engine.device))
    if precision == "auto":
        raise UsageError(
            f"--precision is auto, which may differ between the machines of {engine.name}: pass fp32, bf16 or fp16"
        )
    return precision
