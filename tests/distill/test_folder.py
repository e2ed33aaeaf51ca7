import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from kdfast.distillation.folder import MetricsFile, RunFolder
from kdfast.errors import CheckpointError, DataError, OutputError, UsageError

CONFIG = {"student": "resnet8", "lr": 0.1, "ids": "abc"}


def test_entering_writes_the_config(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG, metadata={"device": "cpu"}) as folder:
        expected = {**CONFIG, "started_with": {"device": "cpu"}}
        assert json.loads((folder.path / "config.json").read_text()) == expected
        folder.save_checkpoint({"step": 1}, 1)
    with RunFolder(tmp_path / "run", CONFIG, metadata={"device": "cuda"}):
        pass


def test_a_run_without_a_checkpoint_can_restart_with_other_settings(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG):
        (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    with RunFolder(tmp_path, {**CONFIG, "lr": 0.2}):
        assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.2
        assert not (tmp_path / "metrics.jsonl").exists(), "rows of other settings"


@pytest.mark.parametrize("mark", ["manifest.json", "train.beton"])
def test_rejects_the_folder_of_another_stage(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).write_text("{}")
    with pytest.raises(OutputError, match=mark), RunFolder(tmp_path, CONFIG):
        pass


def test_rejects_other_settings_and_changes_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.save_checkpoint({"step": 1}, 1)
    before = (tmp_path / "config.json").read_bytes()
    with (
        pytest.raises(UsageError, match=r"other settings: `lr` was 0\.1, is 0\.2\."),
        RunFolder(tmp_path, {**CONFIG, "lr": 0.2}),
    ):
        pass
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("processes", [1, 2])
def test_runs_of_earlier_versions_resume_if_one_process_trained_them(tmp_path: Path, processes: int) -> None:
    with RunFolder(tmp_path, {**CONFIG, "processes": processes}) as folder:
        folder.save_checkpoint({"step": 1}, 1)
    if processes == 1:
        with RunFolder(tmp_path, CONFIG) as folder:
            assert folder.load_checkpoint() == {"step": 1}
    else:
        with pytest.raises(UsageError, match="`processes` was 2, is none"), RunFolder(tmp_path, CONFIG):
            pass


def test_resume_never_requires_a_folder_without_a_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG, resume="never"):
        pass
    with pytest.raises(OutputError, match="already holds a run"), RunFolder(tmp_path, CONFIG, resume="never"):
        pass


def _hold(path: Path, held: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event") -> None:
    with RunFolder(path, CONFIG):
        held.set()
        done.wait(20)


def test_rejects_a_folder_in_use(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, done))
    other.start()
    try:
        assert held.wait(30)
        with pytest.raises(OutputError, match="in use"), RunFolder(tmp_path, CONFIG):
            pass
    finally:
        done.set()
        other.join(20)
    with RunFolder(tmp_path, CONFIG):
        pass


def test_keeps_the_copy_of_a_checkpoint_under_another_name(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        for step in range(1, 5):
            folder.save_checkpoint({"step": step}, step)
            (tmp_path / "checkpoints" / "step-best.pt").write_bytes(b"mine")
    assert sorted(f.name for f in (tmp_path / "checkpoints").glob("*.pt")) == [
        "step-000000003.pt", "step-000000004.pt", "step-best.pt",
    ]  # fmt: skip


def test_checkpoints_round_trip_and_only_two_are_kept(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        assert folder.load_checkpoint() is None
        for step in (10, 20, 30):
            folder.save_checkpoint({"step": step, "w": torch.arange(step)}, step)
        state = folder.load_checkpoint()
        assert state is not None
        assert state["step"] == 30
        assert torch.equal(state["w"], torch.arange(30))
        assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2


def test_keeps_the_checkpoint_named_in_latest_json(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.save_checkpoint({"step": 50}, 50)
        # Checkpoints of processes that were killed before they updated latest.json.
        for orphan in (100, 110):
            (tmp_path / "checkpoints" / f"step-{orphan:09d}.pt").write_bytes(b"")
        folder.save_checkpoint({"step": 60}, 60)
        state = folder.load_checkpoint()
    assert state is not None
    assert state["step"] == 60
    assert sorted(f.name for f in (tmp_path / "checkpoints").glob("*.pt")) == ["step-000000050.pt", "step-000000060.pt"]


def test_resuming_removes_temporary_files_of_killed_writers(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.save_checkpoint({"step": 1}, 1)
    remains = tmp_path / "checkpoints" / ".kdtmp-0123456789ab-step-000000002.pt"
    remains.write_bytes(b"half")
    with RunFolder(tmp_path, CONFIG):
        assert not remains.exists()


def test_rejects_a_damaged_checkpoint(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.save_checkpoint({"w": torch.arange(1000)}, 5)
        file = next((tmp_path / "checkpoints").glob("*.pt"))
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            folder.load_checkpoint()


def test_falls_back_to_the_previous_checkpoint(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as folder:
        for step in (5, 9, 12):
            folder.save_checkpoint({"step": step}, step)
        (tmp_path / "checkpoints" / "step-000000012.pt").write_bytes(b"half")
        state = folder.load_checkpoint()
        assert state is not None
        assert state["step"] == 9
        folder.save_checkpoint({"step": 10}, 10)
        state = folder.load_checkpoint()
        assert state is not None
        assert state["step"] == 10
        (tmp_path / "checkpoints" / "step-000000010.pt").unlink()
        with pytest.raises(CheckpointError, match="so is any previous checkpoint"):
            folder.load_checkpoint()


def test_metrics_never_repeat_a_step_and_cut_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in (1, 2, 2, 1, 3):
        metrics.append({"step": step})
    metrics.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    metrics = MetricsFile(path)
    assert metrics.last_step == 3
    for step in (3, 4):
        metrics.append({"step": step})
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_does_not_overwrite_a_foreign_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("hello\n")
    with pytest.raises(DataError, match="not a metrics row"):
        MetricsFile(path)
    assert path.read_text() == "hello\n"
