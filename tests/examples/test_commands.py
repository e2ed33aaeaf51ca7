"""Each example as a user runs it: ``python -m kdfast.examples.NAME``."""

import importlib
import os
import pkgutil
import re
import runpy
import subprocess
import sys

import pytest

from kdfast import examples

FOUND = [m for m in pkgutil.walk_packages(examples.__path__, "kdfast.examples.") if not m.ispkg and "._" not in m.name]
NAMES = sorted(m.name.removeprefix("kdfast.examples.") for m in FOUND)
NEEDS = {
    "lightning": ["lightning"],
    "hf_trainer": ["transformers", "accelerate"],
    "text.sft": ["transformers", "accelerate", "datasets", "trl"],
    "text.trainer": ["transformers", "accelerate"],
    "timm_loop": ["torchvision", "timm"],
    "timm_task": ["torchvision", "timm", "timm.task"],
    "torchdistill_loss": ["torchvision", "torchdistill"],
    "vit_scores": ["transformers"],
}


def test_finds_all_examples():
    assert NAMES == [
        "ddp", "hf_trainer", "language_model", "lightning", "plain_loop", "text.fsdp", "text.sft", "text.trainer",
        "timm_loop", "timm_task", "torchdistill_loss", "vit_scores",
    ]  # fmt: skip


@pytest.fixture(params=NAMES)
def name(request):
    """An example whose libraries are installed."""
    for package in NEEDS.get(request.param, []):
        pytest.importorskip(package, exc_type=(ImportError, RuntimeError))
    return request.param


# Examples that start processes, which must find the program: least of the largest gradient that they print, and the
# largest difference to the gradient of one process, in units of it.
WITH_PROCESSES = {"ddp": (0.05, 1e-6), "text.fsdp": (0.01, 1e-5)}
# Options for less work.
SMALL = {
    "hf_trainer": ["--steps", "2", "--texts", "16"],
    "language_model": ["--steps", "2", "--teacher-steps", "2", "--texts", "16"],
    "lightning": ["--epochs", "1"],
    "plain_loop": ["--epochs", "2"],
    "text.trainer": ["--steps", "2", "--texts", "16"],
    "vit_scores": ["--epochs", "1", "--samples", "100"],
}


def run_alone(name, folder):
    """Run an example in a process of its own and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", f"kdfast.examples.{name}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function that runs an example in this process, which need not import its libraries again."""

    def run(name, folder):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [name, *SMALL.get(name, [])])
        monkeypatch.delitem(sys.modules, f"kdfast.examples.{name}", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"kdfast.examples.{name}", run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("default")
def test_command_runs_and_leaves_no_files(name, tmp_path, run_here):
    printed = (run_alone if name in WITH_PROCESSES else run_here)(name, tmp_path)
    assert "Result(" in printed
    assert not list(tmp_path.iterdir())
    if name in WITH_PROCESSES:
        least, most = WITH_PROCESSES[name]
        largest, difference = map(float, re.search(r"largest=(\S+), difference=(\S+)\)", printed).groups())
        assert largest > least
        assert difference < most * largest


def test_docstring_explains_every_option(name):
    main = importlib.import_module(f"kdfast.examples.{name}").main
    for argument in main.__annotations__.keys() - {"return"}:
        assert f"{argument}:" in main.__doc__
