"""Commands that one process runs, where torchrun has started more; and parts of a cache by jobs."""

import os
from pathlib import Path

import pytest


def start(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))


def test_the_main_process_alone_runs_other_commands(kdfast, tiny, tmp_path, monkeypatch):
    command = ("prune", "--data", tiny, "--method", "random", "--fraction", 0.5, "--out", tmp_path / "idx.npy")
    start(monkeypatch, 1)
    assert kdfast(*command) == (0, "", "")
    assert not (tmp_path / "idx.npy").exists()
    start(monkeypatch, 0)
    done = kdfast(*command)
    assert done.code == 0
    assert "kdfast: prune runs in one process: the others of the 2 that were started do nothing" in done.err
    assert (tmp_path / "idx.npy").exists()
    assert "WORLD_SIZE" not in os.environ


def test_the_main_process_alone_computes_scores_without_a_network(kdfast, tiny, tmp_path, monkeypatch):
    command = ("score", "--data", tiny, "--method", "random", "--out", tmp_path / "scores.npz")
    start(monkeypatch, 1)
    assert kdfast(*command) == (0, "", "")
    start(monkeypatch, 0)
    done = kdfast(*command)
    assert done.code == 0
    assert "score --method random runs in one process" in done.err


def test_only_the_main_process_prints_and_warns(kdfast, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert kdfast("score", "--data", tiny, "--method", "random", "--out", tmp_path / "scores.npz").code == 0
    start(monkeypatch, 1)
    command = ("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, "--out", tmp_path / "run")
    assert kdfast(*command, "--dry-run") == (0, "", "")


@pytest.mark.parametrize("shard", ["1", "2/2", "-1/2", "a/b", "1/2/3", "0/0"])
def test_wrong_parts_are_refused(kdfast, tiny, teacher, tmp_path, shard):
    done = kdfast("cache", "--data", tiny, "--teacher", teacher, "--out", tmp_path / "cache", f"--shard={shard}")
    assert done.code == 2
    assert f"--shard is '{shard}': pass I/N, with I from 0 to N - 1" in done.err
    assert not (tmp_path / "cache").exists()


def test_a_part_beside_others_is_not_forced(kdfast, tiny, teacher, tmp_path):
    done = kdfast(
        "cache", "--data", tiny, "--teacher", teacher, "--out", tmp_path / "cache", "--shard", "0/2", "--force"
    )
    assert done.code == 2
    assert "--force" in done.err


def test_parts_by_jobs_and_their_merger(kdfast, tiny, teacher, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("kdfast.teacher.build.samples_per_shard", lambda *sizes: 50)
    command = ("cache", "--data", tiny, "--teacher", teacher, "--device", "cpu")
    assert kdfast(*command, "--out", tmp_path / "one").code == 0
    for part in range(2):
        done = kdfast(*command, "--out", tmp_path / f"part-{part}", "--shard", f"{part}/2")
        assert done.code == 0, done.err
        assert f"part {part}/2 is done" in done.out
    missing = kdfast("cache", "merge", tmp_path / "part-1", "--out", tmp_path / "merged")
    assert missing.code == 3
    assert missing.err == "kdfast: of 2 parts, these are not given: 0/2; pass the folders of all\n"
    merged = kdfast("cache", "merge", tmp_path / "part-1", tmp_path / "part-0", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    assert "merged 2 parts: 120 samples" in merged.out
    for file in (tmp_path / "one").iterdir():
        if file.is_file() and file.name != "timing.json" and not file.name.startswith("."):
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()
