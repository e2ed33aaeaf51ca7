"""A command of several processes ends clearly: with one line, at once, and so that the same command resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import TCPStore

RunAll = Callable[..., list[tuple[int, str, str]]]
Start = Callable[..., list[subprocess.Popen[str]]]
DISTILL = (
    "-m", "kdfast", "distill", "--data", "digits", "--student", "resnet8", "--alpha", "0", "--epochs", "4",
    "--batch-size", "64", "--lr", "0.01", "--device", "cpu", "--log-every", "5", "--checkpoint-seconds", "0",
)  # fmt: skip


def own_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("kdfast: ")]


def test_the_first_process_that_fails_says_why_and_the_others_say_nothing(run_all: RunAll, tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    command = ["score", "--data", "digits", "--method", "nothing", "--out", tmp_path / "scores.npz"]
    ended = run_all([{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)], "kdfast", *command)
    assert [code for code, _, _ in ended] == [2, 2]
    assert [out for _, out, _ in ended] == ["", ""]
    (line,) = [line for _, _, errors in ended for line in errors.splitlines()]
    assert "no score is named 'nothing'" in line


@pytest.mark.slow
def test_torchrun_reports_a_failure_after_the_line_of_kdfast(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdfast", "score",
        "--data", "digits", "--method", "nothing", "--out", str(tmp_path / "scores.npz"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = own_lines(done.stderr)
    assert "no score is named 'nothing'" in line
    assert "kdfast/" not in done.stderr, "no traceback of a process"


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_others_and_the_command_resumes(start: Start, tmp_path: Path, lost: int) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    for process in start(2, *DISTILL, "--out", whole):
        assert process.communicate(timeout=300) is not None
    processes = start(2, *DISTILL, "--out", out)
    until = time.monotonic() + 240
    while not (out / "checkpoints" / "latest.json").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    processes[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    text, errors = processes[1 - lost].communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert processes[1 - lost].returncode == 75, errors
    assert text == ""
    (line,) = own_lines(errors)
    assert line == "kdfast: another process of this command has ended: run the same command again to resume"
    processes[lost].communicate()
    if lost:
        assert json.loads((out / "status.json").read_text())["state"] == "interrupted"
    for process in start(2, *DISTILL, "--out", out):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    weights = [json.loads((folder / "result.json").read_text())["weights"] for folder in (whole, out)]
    assert weights[0] == weights[1], "the bits of a run that nothing interrupted"
    # Another number of processes would resume it, too: it is the same run.
    (again,) = start(1, *DISTILL, "--out", out)
    text, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "top-1" in text
