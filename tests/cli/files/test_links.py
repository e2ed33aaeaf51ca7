"""Output folders that someone else prepared: links lead nothing out of them, and foreign files stay as they are."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdfast.distillation.folder import MetricsFile, RunFolder
from kdfast.dynamics.recorder import DynamicsRecorder
from kdfast.errors import CacheMismatch, CheckpointError, DataError, OutputError
from kdfast.files import FolderLock, is_plain_name, read_json, write_json
from kdfast.sweep.results_log import ResultsLog
from kdfast.teacher.checks import check_intact

LOCK = ".kdfast.lock"
VICTIM = b"Two years of notes, without a newline at the end."
CONFIG = {"student": "resnet8"}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file and a folder that belong to someone else."""
    file = tmp_path / "victim"
    file.write_bytes(VICTIM)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "step-000000001.pt").write_bytes(VICTIM)
    return file


def unchanged(victim: Path) -> bool:
    others = victim.parent / "others"
    return (
        victim.read_bytes() == VICTIM
        and os.listdir(others) == ["step-000000001.pt"]
        and (others / "step-000000001.pt").read_bytes() == VICTIM
    )


def commands(tiny: Path, teacher: Path, out: Path) -> dict[str, tuple[object, ...]]:
    training = ("--data", tiny, "--net", "resnet8", "--epochs", 1, "--batch-size", 20)
    return {
        "distill": ("distill", *training, "--alpha", 0, "--out", out),
        "train": ("teacher", "train", *training, "--out", out.with_suffix("")),
        "dynamics": ("dynamics", *training, "--out", out),
        "cache": ("cache", "--data", tiny, "--teacher", teacher, "--views", 1, "--out", out),
        "sweep": ("sweep", *training[:2], "--student", "resnet8", "--kd", "off", "--fractions", 0.5, "--steps", 1,
                  "--batch-size", 20, "--out", out),
        "convert": ("data", "convert", tiny, out),
    }  # fmt: skip


LINKS = [
    *((command, LOCK, "victim") for command in ("distill", "train", "dynamics")),
    pytest.param("convert", LOCK, "victim", marks=pytest.mark.slow),  # it loads FFCV
    ("cache", ".building/rank-0/.kdfast.lock", "victim"),
    ("distill", "checkpoints", "empty"),
    ("train", "checkpoints", "others"),
    ("dynamics", "run-00", "others"),
    ("cache", ".building", "others"),
    ("sweep", "results.jsonl", "victim"),
    ("sweep", ".claims", "victim"),
    ("sweep", "runs", "others"),
]


@pytest.mark.parametrize(("command", "name", "target"), LINKS)
def test_no_command_writes_through_a_link(kdfast, tiny, teacher, victim, tmp_path, command, name, target):
    if command == "convert":
        pytest.importorskip("ffcv")
    out = tmp_path / "t.run"
    (out / name).parent.mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    if command == "sweep" and name != "results.jsonl":
        (out / "results.jsonl").write_text("")
    if (command, name) == ("dynamics", "run-00"):
        with DynamicsRecorder(out, 3, [0, 1, 2], epochs=1):
            pass
        shutil.rmtree(out / name)
    (out / name).symlink_to(tmp_path / target)
    if (command, name) == ("dynamics", "run-00"):
        with pytest.raises(OutputError, match="symbolic link"):
            DynamicsRecorder(out, 3, [0, 1, 2], epochs=1)
    else:
        ran = kdfast(*commands(tiny, teacher, out)[command])
        assert ran.code == 4, ran.err
        assert "symbolic link" in ran.err or "holds checkpoints" in ran.err
    assert unchanged(victim)
    assert not os.listdir(tmp_path / "empty")


@pytest.mark.parametrize("made", ["a pipe", "a foreign file", "a hard link", "a file that begins like a lock"])
def test_locks_only_a_lock_file(victim: Path, tmp_path: Path, made: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if made == "a pipe":
        os.mkfifo(out / LOCK)
    elif made == "a foreign file":
        (out / LOCK).write_bytes(VICTIM)
    elif made == "a file that begins like a lock":
        (out / LOCK).write_bytes(notes := b"process 12 on my list: buy milk")
    else:
        os.link(victim, out / LOCK)
    with pytest.raises(OutputError, match=r"\.kdfast\.lock"), FolderLock(out):
        pass
    assert unchanged(victim)
    if made == "a file that begins like a lock":
        assert (out / LOCK).read_bytes() == notes
    if made == "a foreign file":
        assert (out / LOCK).read_bytes() == VICTIM


def test_appends_to_no_link_and_cuts_no_foreign_line(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(OutputError, match="symbolic link"):
        MetricsFile(tmp_path / "metrics.jsonl")
    (tmp_path / "results.jsonl").symlink_to(victim)
    with pytest.raises((OutputError, DataError)):
        ResultsLog(tmp_path).append({"key": "a"})
    for name in ("metrics.jsonl", "results.jsonl"):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(VICTIM)
    with pytest.raises(DataError, match="not a metrics row"):
        MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match="not a row"):
        ResultsLog(tmp_path).append({"key": "a"})
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "results.jsonl").read_bytes() == VICTIM
    assert unchanged(victim)


def test_reads_no_checkpoint_from_another_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "other", CONFIG) as other:
        other.save_checkpoint({"secret": 1}, 1)
    with RunFolder(tmp_path / "run", CONFIG) as run:
        run.save_checkpoint({"step": 1}, 1)
        pointer = run.path / "checkpoints" / "latest.json"
        for path in ("../../other/checkpoints/step-000000001.pt", str(other.path / "checkpoints/step-000000001.pt")):
            shutil.rmtree(run.path / "checkpoints")
            (run.path / "checkpoints").mkdir()
            write_json(pointer, {**read_json(other.path / "checkpoints" / "latest.json"), "file": path})
            with pytest.raises((CheckpointError, DataError)):
                run.load_checkpoint()


def test_manifests_name_no_file_of_another_folder(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "cache").mkdir()
    with pytest.raises(CacheMismatch, match="no file of this folder"):
        check_intact(tmp_path / "cache", {"../victim": {"bytes": len(VICTIM), "sha256": "0"}})
    from kdfast.dynamics.format import require_files

    with pytest.raises(DataError, match="no file of it"):
        require_files(tmp_path / "cache", {str(victim): {"bytes": len(VICTIM), "sha256": "0"}}, check_sums=False)
    assert [is_plain_name(name) for name in ("a.npy", "..", "a/b", "/a", "", 3)] == [True] + [False] * 5


def test_a_killed_start_of_a_recording_resumes(tmp_path: Path) -> None:
    """The plan is written before the labels, so that no foreign labels.npy is taken for one of its own."""
    np.save(tmp_path / "labels.npy", np.arange(9))
    with pytest.raises(OutputError, match=r"labels\.npy"):
        DynamicsRecorder(tmp_path, 3, [0, 1, 2], epochs=1)
    assert np.load(tmp_path / "labels.npy").tolist() == list(range(9))
    with DynamicsRecorder(tmp_path / "new", 3, [0, 1, 2], epochs=1):
        (tmp_path / "new" / "labels.npy").unlink()
    with DynamicsRecorder(tmp_path / "new", 3, [0, 1, 2], epochs=1):
        assert np.load(tmp_path / "new" / "labels.npy").tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "new" / "plan.json").read_text())["samples"] == 3
