"""Each example as a user runs it: ``python -m kdfast.examples.NAME``."""

import importlib
import os
import pkgutil
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


def test_command_runs_and_leaves_no_files(name, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", f"kdfast.examples.{name}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Result(" in run.stdout
    assert not list(tmp_path.iterdir())


def test_docstring_explains_every_option(name):
    main = importlib.import_module(f"kdfast.examples.{name}").main
    for argument in main.__annotations__.keys() - {"return"}:
        assert f"{argument}:" in main.__doc__
