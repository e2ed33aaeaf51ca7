"""An output is used again by the same command; another result needs --force, which replaces kdfast's own files only."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdfast.files import FolderLock

TRAINING = ("--epochs", 1, "--batch-size", 40)


def commands(tiny: Path, teacher: Path, folder: Path) -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str]]:
    """Return for each name a command, options that change its result, and a file of the result."""
    return {
        "distill": (
            ("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, *TRAINING, "--out", folder / "run"),
            ("--seed", 1),
            "run/student.pt",
        ),
        "train": (
            ("teacher", "train", "--data", tiny, "--net", "resnet8", *TRAINING, "--out", folder / "t.pt"),
            ("--seed", 1),
            "t.pt",
        ),
        "cache": (
            ("cache", "--data", tiny, "--teacher", teacher, "--views", 2, "--out", folder / "cache"),
            ("--view-seed", 1),
            "cache/manifest.json",
        ),
        "dynamics": (
            ("dynamics", "--data", tiny, "--net", "resnet8", *TRAINING, "--out", folder / "dynamics"),
            ("--seed", 1),
            "dynamics/manifest.json",
        ),
        "score": (("score", "--data", tiny, "--method", "random", "--out", folder / "s.npz"), ("--seed", 1), "s.npz"),
        "prune": (("prune", "--data", tiny, "--fraction", 0.5, "--out", folder / "i.npy"), ("--seed", 1), "i.npy"),
    }


@pytest.mark.parametrize("name", ["distill", "train", "cache", "dynamics", "score", "prune"])
def test_another_result_needs_force(kdfast, tiny: Path, teacher: Path, tmp_path: Path, name: str) -> None:
    command, change, file = commands(tiny, teacher, tmp_path)[name]
    assert kdfast(*command).code == 0
    again = kdfast(*command)
    assert again.code == 0, f"the same command uses its output again: {again.err}"
    first = (tmp_path / file).read_bytes()
    refused = kdfast(*command, *change)
    assert refused.code in (2, 3, 4), refused
    assert refused.err.count("\n") == 1 or "images are" in refused.err
    assert (tmp_path / file).read_bytes() == first
    if name in ("cache", "dynamics"):
        mine = (tmp_path / file).with_name("mine.txt")
        mine.write_text("mine")
        ran = kdfast(*command, *change, "--force")
        assert (ran.code, "also holds mine.txt" in ran.err) == (4, True), ran.err
        assert (tmp_path / file).read_bytes() == first
        mine.unlink()
    forced = kdfast(*command, *change, "--force")
    assert forced.code == 0, forced.err
    assert (tmp_path / file).read_bytes() != first
    assert kdfast(*command, *change).code == 0


def test_a_dry_run_with_force_deletes_nothing(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    for name in ("distill", "cache", "dynamics"):
        command, change, file = commands(tiny, teacher, tmp_path)[name]
        assert kdfast(*command).code == 0
        before = (tmp_path / file).read_bytes()
        assert kdfast(*command, *change, "--force", "--dry-run").code == 0
        assert (tmp_path / file).read_bytes() == before


def test_force_replaces_no_foreign_files(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    for name, (command, _, file) in commands(tiny, teacher, tmp_path).items():
        foreign = (tmp_path / file).with_name("t.pt" if name == "train" else Path(file).name)
        foreign.parent.mkdir(exist_ok=True)
        foreign.write_bytes(b"mine")
        ran = kdfast(*command, "--force")
        assert ran.code in (3, 4), (name, ran)
        assert foreign.read_bytes() == b"mine", name


def test_force_waits_for_no_other_process(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    command, change, file = commands(tiny, teacher, tmp_path)["cache"]
    assert kdfast(*command).code == 0
    with FolderLock(tmp_path / "cache"):
        ran = kdfast(*command, *change, "--force")
    assert (ran.code, "is in use by" in ran.err) == (4, True), ran.err
    assert json.loads((tmp_path / file).read_text())["views"]["view_seed"] == 0


def test_force_flips_labels_again(kdfast, tiny: Path, tmp_path: Path) -> None:
    command = ("data", "flip", tiny, tmp_path / "flipped")
    assert kdfast(*command).code == 0
    first = np.load(tmp_path / "flipped" / "labels.npy")
    assert kdfast(*command, "--seed", 1).code == 4
    assert kdfast(*command, "--seed", 1, "--force").code == 0
    assert (np.load(tmp_path / "flipped" / "labels.npy") != first).any()


def test_force_and_never_exclude_each_other(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    command, _, _ = commands(tiny, teacher, tmp_path)["distill"]
    ran = kdfast(*command, "--force", "--resume", "never")
    assert (ran.code, "--force and --resume never exclude each other" in ran.err) == (2, True)


def test_a_small_disk_is_refused_before_the_work(
    kdfast, tiny: Path, teacher: Path, tmp_path: Path, monkeypatch
) -> None:
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr("kdfast.files.space.shutil.disk_usage", lambda path: usage)
    for name in ("cache", "dynamics"):
        command, _, _ = commands(tiny, teacher, tmp_path)[name]
        ran = kdfast(*command)
        assert (ran.code, "takes about" in ran.err and "1 bytes free" in ran.err) == (4, True), ran.err
        assert not list(tmp_path.iterdir())
        assert kdfast(*command, "--dry-run").code == 4


def test_a_small_disk_is_refused_before_force_deletes(
    kdfast, tiny: Path, teacher: Path, tmp_path: Path, monkeypatch
) -> None:
    command, change, file = commands(tiny, teacher, tmp_path)["cache"]
    assert kdfast(*command).code == 0
    before = (tmp_path / file).read_bytes()
    monkeypatch.setattr("kdfast.files.space.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 40_000))
    assert kdfast(*command, "--views", 9, "--dtype", "float32", "--force").code == 4
    assert (tmp_path / file).read_bytes() == before
    assert kdfast(*command, *change, "--force").code == 0, "the space of what is deleted counts as free"


def test_prune_writes_no_subset_if_one_is_refused(kdfast, tiny: Path, tmp_path: Path) -> None:
    command = ("prune", "--data", tiny, "--out", tmp_path / "i-{fraction}.npy")
    assert kdfast(*command, "--fraction", 0.5).code == 0
    ran = kdfast(*command, "--fraction", 0.25, "--fraction", 0.5, "--seed", 1)
    assert (ran.code, "i-0.5.npy exists and holds another result" in ran.err) == (4, True), ran.err
    assert {file.name for file in tmp_path.iterdir()} == {"i-0.5.npy", "i-0.5.json"}


def test_force_replaces_imported_outputs_once_others_are_checked(kdfast, tiny: Path, tmp_path: Path) -> None:
    logits = 3 * np.eye(3, dtype=np.float32)[np.arange(120) % 3]
    for name, values in (("a", logits), ("b", 2 * logits), ("bad", logits[:5])):
        np.save(tmp_path / f"{name}.npy", values)
    out, command = tmp_path / "cache", ("--data", tiny, "--out", tmp_path / "cache")
    assert kdfast("cache", "import", tmp_path / "a.npy", *command).code == 0
    before = (out / "manifest.json").read_bytes()
    assert kdfast("cache", "import", tmp_path / "b.npy", *command).code == 3
    assert kdfast("cache", "import", tmp_path / "bad.npy", *command, "--force").code == 3
    assert (out / "manifest.json").read_bytes() == before
    assert kdfast("cache", "import", tmp_path / "b.npy", *command, "--force").code == 0
    assert (out / "manifest.json").read_bytes() != before


def test_an_interrupted_force_resumes_without_it(kdfast, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    from kdfast.distillation.trainer import Trainer

    command = ("teacher", "train", "--data", tiny, "--net", "resnet8", *TRAINING, "--out", tmp_path / "t.pt",
               "--checkpoint-seconds", 0)  # fmt: skip
    assert kdfast(*command).code == 0
    step = Trainer.train_step

    def stop(self: Trainer, batch: object) -> None:
        step(self, batch)
        if self.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        patch.setattr("sys.argv", ["kdfast", *map(str, command), "--seed", "1", "--force"])
        ran = kdfast(*command, "--seed", 1, "--force")
    assert (ran.code, "run the same command without --force to resume" in ran.err) == (75, True), ran.err
    ran = kdfast(*command, "--seed", 1)
    assert (ran.code, "resuming at step 1 of 3" in ran.err) == (0, True), ran.err


def test_long_work_is_announced(kdfast, tiny: Path, teacher: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kdfast.cli.progress.LARGE_BYTES", 0)
    command, _, _ = commands(tiny, teacher, tmp_path)["cache"]
    ran = kdfast(*command)
    assert ran.code == 0, ran.err
    files = (tmp_path / "cache").glob("*.npy")
    assert 33_600 < sum(file.stat().st_size for file in files) < 36_000
    assert f"kdfast: writes about 33.6 kB to {tmp_path / 'cache'} (" in ran.err
    assert "writes about" not in kdfast(*command, "--quiet").err
