"""After a run diverged, the same command with a lower learning rate runs, with the same --out."""

from pathlib import Path

import pytest

TRAINING = ("--epochs", 3)  # of several steps: after the first, the weights overflow
COMMANDS = {
    "distill": ("distill", "--student", "resnet8", "--alpha", 0, *TRAINING),
    "teacher train": ("teacher", "train", "--net", "resnet8", *TRAINING),
    "dynamics": ("dynamics", "--net", "resnet8", *TRAINING),
    "sweep": (*("sweep", "--student", "resnet8", "--steps", 6, "--methods", "random", "--kd", "off"),
              *("--fractions", "0.5", "--seeds", 0)),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_the_corrected_command_runs(kdfast, tiny: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / ("t.pt" if command == "teacher train" else "out")
    given = (*COMMANDS[command], "--data", tiny, "--batch-size", 20, "--out", out)
    failed = kdfast(*given, "--lr", "1e30")
    assert failed.code == 5, failed.err
    if command != "sweep":
        assert "The files of this run are kept" in failed.err
    found = kdfast(*given, "--lr", "0.01")
    assert found.code == 0, found.err
