"""`kdfast sweep --engine slurm`: the file for sbatch, and jobs that submitit runs on this machine in place of Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from kdfast.sweep.parallel.engine import choose_engine
from kdfast.sweep.parallel.slurm_jobs import sbatch_parameters

submitit = pytest.importorskip("submitit")

SWEEP = ("sweep", "--student", "resnet8", "--kd", "off", "--batch-size", 10, "--fractions", 0.5)
JOBS = ("--engine", "slurm", "--slurm-option", "time=3:00:00", "--slurm-option", "partition=gpu", "--jobs", 2)


def facts(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return sorted((row["key"], row["weights"], row["test_top1"], row["subset"]) for row in rows)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let submitit start the jobs on this machine."""
    monkeypatch.setattr(submitit, "SlurmExecutor", submitit.LocalExecutor)
    monkeypatch.setattr(shutil, "which", lambda name: name)


def text_for_sbatch(folder: Path, **settings) -> list[str]:
    os.environ["PATH"] += os.pathsep + str(folder)  # of srun
    (folder / "srun").write_text("#!/bin/sh\n")
    (folder / "srun").chmod(0o755)
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(**sbatch_parameters(choose_engine("slurm", "auto", **settings), 3))
    executor.parameters["map_count"] = 3
    return executor._make_submission_file_text("COMMAND", "id").splitlines()


def test_the_file_for_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    options = {"time": "3:00:00", "partition": "gpu", "mail-type": "END"}
    lines = text_for_sbatch(tmp_path, gpus_per_job=1, cpus_per_job=4, slurm_options=options)
    expected = {
        "time=3:00:00", "partition=gpu", "mail-type=END", "cpus-per-task=4", "gpus-per-node=1", "array=0-2%3",
        "signal=USR2@90", "job-name=kdfast", f"output={tmp_path}/%A_%a_0_log.out",
    }  # fmt: skip
    assert expected <= {line.removeprefix("#SBATCH --") for line in lines}
    assert lines[-1].startswith("srun ")
    lines = text_for_sbatch(tmp_path, slurm_options={"time": "60", "gres": "gpu:2"})
    assert "#SBATCH --gres=gpu:2" in lines
    assert not any("gpus-per-node" in line for line in lines)


def test_jobs_share_the_runs(kdfast, local: None, tiny: Path, tmp_path: Path) -> None:
    command = (*SWEEP, "--data", tiny, "--steps", 12, "--seeds", "0,1,2")
    outcome = kdfast(*command, *JOBS, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    alone = kdfast(*command, "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert facts(tmp_path / "out") == facts(tmp_path / "alone")
    assert len(list((tmp_path / "out" / "slurm").glob("*_submitted.pkl"))) == 2
    again = kdfast(*command, *JOBS, "--out", tmp_path / "out")
    assert again.code == 0, again.err
    assert len(list((tmp_path / "out" / "slurm").glob("*_submitted.pkl"))) == 2, "no job where nothing is left to do"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["time limit", "kill -9"])
def test_a_run_of_a_job_that_ends_early_is_resumed(kdfast, local: None, tiny: Path, tmp_path: Path, kind: str) -> None:
    out, found = tmp_path / "out", []
    command = (*SWEEP, "--data", tiny, "--steps", 200, "--seeds", "0,1,2")

    def at_work() -> list[int]:
        locks = [lock for lock in out.glob("runs/*/.kdfast.lock") if (lock.parent / "metrics.jsonl").exists()]
        return [int(holder[1]) for lock in locks if (holder := re.search(r"process (\d+)", lock.read_text()))]

    def interrupt() -> None:
        while not at_work():
            time.sleep(0.02)
        found.append(at_work()[0])
        os.kill(found[0], signal.SIGUSR2 if kind == "time limit" else signal.SIGKILL)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = kdfast(*command, *JOBS, "--out", out)
    thread.join()
    assert outcome.code == 0, outcome.err
    alone = kdfast(*command, "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert facts(out) == facts(tmp_path / "alone")
    logs = "".join(log.read_text() for log in (out / "slurm").glob("*_log.out"))
    assert kind == "kill -9" or "Requeued job" in logs
