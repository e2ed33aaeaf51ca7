"""Finished runs keep no checkpoints unless asked to; `kdfast clean` deletes what is left, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from kdfast.files import FolderLock

TRAINING = ("--student", "resnet8", "--alpha", 0, "--epochs", 1, "--batch-size", 40)


@pytest.fixture
def kept(finished: Path) -> Path:
    return finished


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != ".kdfast.lock"}


def test_a_finished_run_has_no_checkpoints(kdfast, tiny: Path, tmp_path: Path) -> None:
    command = ("distill", "--data", tiny, *TRAINING, "--out", tmp_path / "run")
    assert kdfast(*command).code == 0
    expected = {"config.json", "metrics.jsonl", "result.json", "status.json", "student.pt"}
    assert files(tmp_path / "run") == expected
    again = kdfast(*command)
    assert (again.code, files(tmp_path / "run")) == (0, expected)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_was_killed_after_its_result_ends_when_it_is_run_again(
    kdfast, tiny: Path, kept: Path, tmp_path: Path
) -> None:
    command = ("distill", "--data", tiny, *TRAINING, "--out", tmp_path / "run")
    run = shutil.copytree(kept, tmp_path / "run")
    assert kdfast(*command).code == 0
    assert files(run) == files(kept), "what was kept stays"
    (run / "status.json").write_text(json.dumps({"state": "running"}))
    assert kdfast(*command).code == 0
    assert not (run / "checkpoints").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_clean_says_what_it_deleted(kdfast, tiny: Path, kept: Path, tmp_path: Path) -> None:
    run = shutil.copytree(kept, tmp_path / "run")
    (run / ".kdtmp-0123456789ab-student.pt").write_bytes(b"half")
    (run / "checkpoints" / "notes.txt").write_text("mine")
    (run / "mine.txt").write_text("mine")
    half = run / ".kdtmp-0123456789ab-student.pt"
    doomed = [*(run / "checkpoints").glob("step-*.pt"), run / "checkpoints" / "latest.json", half]
    size, before = sum(file.stat().st_size for file in doomed), files(run)
    ran = kdfast("clean", run, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["runs"] == [{"run": str(run), "files": len(doomed), "bytes": size}]
    assert before - files(run) == {str(file.relative_to(run)) for file in doomed}
    assert f"{run}: deleted 0 files, 0 bytes" in kdfast("clean", run).out
    result = kdfast("distill", "--data", tiny, *TRAINING, "--out", run)
    assert result.code == 0, "the finished run is still verified and printed"


def test_clean_refuses_what_is_not_finished_damaged_or_in_use(kdfast, kept: Path, tmp_path: Path) -> None:
    run = shutil.copytree(kept, tmp_path / "run")
    before = files(run)
    with FolderLock(run):
        assert kdfast("clean", run).code == 4
    (run / "student.pt").write_bytes(b"")
    ran = kdfast("clean", run)
    assert (ran.code, "student.pt" in ran.err) == (3, True)
    (run / "result.json").unlink()
    ran = kdfast("clean", run)
    assert (ran.code, "is not finished" in ran.err, "--force" in ran.err) == (4, True, True), ran.err
    assert files(run) == before - {"result.json"}
    assert kdfast("clean", run, "--force").code == 0
    assert not (run / "checkpoints").exists()
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "other", tmp_path / "nowhere", kept / "student.pt"):
        ran = kdfast("clean", path)
        assert (ran.code, "holds no run" in ran.err) == (3, True), ran.err
