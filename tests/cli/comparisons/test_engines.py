"""Options of engines, of `kdfast sweep` and `kdfast reproduce` alike."""

import re
import shutil
import sys
from pathlib import Path

import pytest

SWEEP = ("--student", "resnet8", "--kd", "off", "--steps", 6, "--batch-size", 10, "--fractions", 0.5)
BAD = {
    "name": (("--engine", "rya"), r"--engine is 'rya': did you mean 'ray'\? pass one of local, ray, slurm"),
    "address of another": (
        ("--ray-address", "local"),
        "--engine is local, and --ray-address is for ray: omit one of them",
    ),
    "option of another": (
        ("--engine", "ray", "--slurm-option", "time=3"),
        "--engine is ray, and --slurm-option is for slurm: omit one of them",
    ),
    "cores here": (("--cpus-per-job", 2), "--cpus-per-job is for ray and slurm"),
    "address": (("--engine", "ray", "--ray-address", "here"), "--ray-address is 'here': pass auto, local or HOST:PORT"),
    "device": (("--engine", "ray", "--device", "cuda:1"), "the engine ray assigns the GPUs: pass auto, cpu or cuda"),
    "no GPU": (("--engine", "ray", "--device", "cpu", "--gpus-per-job", 1), "--gpus-per-job is 1, and --device is cpu"),
    "no GPUs": (("--engine", "ray", "--device", "cuda", "--gpus-per-job", 0), "--device is cuda, and --gpus-per-job"),
    "share": (("--engine", "ray", "--gpus-per-job", 1.5), "--gpus-per-job is 1.5: pass a whole number, or a share"),
    "infinite": (("--engine", "ray", "--gpus-per-job", "inf"), "--gpus-per-job is inf: pass a finite number"),
    "precision": (
        ("--engine", "ray", "--precision", "auto"),
        "--precision is auto, which may differ between the machines of ray: pass fp32, bf16 or fp16",
    ),
    "time": (("--engine", "slurm"), "--engine is slurm, whose jobs need a time limit: pass --slurm-option time="),
    "own": (
        ("--engine", "slurm", "--slurm-option", "time=3", "--slurm-option", "array=0-3"),
        "--slurm-option sets array, which the engine sets itself",
    ),
    "cores of Slurm": (
        ("--engine", "slurm", "--slurm-option", "time=3", "--slurm-option", "cpus-per-task=4"),
        "--slurm-option sets cpus-per-task: pass --cpus-per-job instead",
    ),
    "pair": (("--engine", "slurm", "--slurm-option", "time"), "--slurm-option is 'time': pass NAME=VALUE"),
    "dashes": (("--engine", "slurm", "--slurm-option", "--time=3"), "pass a long option of sbatch"),
    "GPUs twice": (
        ("--engine", "slurm", "--slurm-option", "time=3", "--slurm-option", "gres=gpu:1", "--gpus-per-job", 1),
        "--gpus-per-job is 1, and a --slurm-option gives GPUs too",
    ),
    "number": (
        ("--engine", "slurm", "--slurm-option", "time=3", "--jobs", "auto"),
        "--jobs is 'auto': pass a number from 1 to 1024",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["sweep", "reproduce"])
def test_what_does_not_fit_is_named_in_one_line(kdfast, tiny: Path, tmp_path: Path, command: str, name: str) -> None:
    options, message = BAD[name]
    words = ("sweep", *SWEEP) if command == "sweep" else ("reproduce", "fig3")
    outcome = kdfast(*words, "--data", tiny, *options, "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert re.search(message, outcome.err), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named(
    kdfast, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = ("--slurm-option", "time=3") if engine == "slurm" else ()
    outcome = kdfast("sweep", *SWEEP, "--data", tiny, "--engine", engine, *options, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert f"pip install 'kdfast[{engine}]'" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_cluster_is_said_at_once(kdfast, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("submitit")
    common = ("sweep", *SWEEP, "--data", tiny, "--out", tmp_path / "out")
    ray = kdfast(*common, "--engine", "ray", "--ray-address", "127.0.0.1:1")
    assert ray.code == 2
    assert "--ray-address is 127.0.0.1:1, and there is no Ray cluster" in ray.err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    slurm = kdfast(*common, "--engine", "slurm", "--slurm-option", "time=3")
    assert slurm.code == 2
    assert "this machine has no srun" in slurm.err
    assert not (tmp_path / "out").exists()


def test_a_budget_is_of_this_machine(kdfast, tiny: Path, tmp_path: Path) -> None:
    outcome = kdfast("reproduce", "fig3", "--data", tiny, "--engine", "ray", "--budget", "3h", "--out", tmp_path / "o")
    assert outcome.code == 2
    assert "--budget is 3h, and the speed of the machines of ray is not known" in outcome.err


def test_the_theorem_runs_on_no_engine(kdfast, tmp_path: Path) -> None:
    outcome = kdfast("reproduce", "theorem", "--engine", "ray", "--out", tmp_path / "o")
    assert outcome.code == 2
    assert "the theorem takes no --engine: omit it" in outcome.err
