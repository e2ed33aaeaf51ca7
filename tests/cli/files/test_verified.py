"""What a command reads back is verified before its result is printed or copied: exit code 3, and which file."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdfast.nets.checkpoint import load_model, save_model

TRAINING = ("--epochs", 1, "--batch-size", 20)


def empty(student: Path) -> None:
    student.write_bytes(b"")


def exchange(student: Path) -> None:
    """Replace the weights, as by the student of another run."""
    model = load_model(student)
    with torch.no_grad():
        next(model.net.parameters()).neg_()
    save_model(student, model)


def relabel(student: Path) -> None:
    """Swap two class names."""
    content = torch.load(student, weights_only=True)
    first, second, *rest = content["class_names"]
    torch.save({**content, "class_names": [second, first, *rest]}, student)


COMMANDS: dict[str, tuple[tuple[object, ...], str]] = {
    "distill": (("distill", "--student", "resnet8", "--alpha", 0, *TRAINING), "student.pt"),
    "teacher train": (("teacher", "train", "--net", "resnet8", *TRAINING), "../out.run/student.pt"),
    "dynamics": (("dynamics", "--net", "resnet8", *TRAINING), "run-00/training/student.pt"),
    "sweep": (
        ("sweep", "--student", "resnet8", "--methods", "random", "--fractions", "0.5", "--seeds", "0", "--kd", "off",
         "--steps", 3, "--batch-size", 20, "--keep-runs"),
        "runs/*/student.pt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_finished_run_whose_student_has_changed(kdfast, tiny: Path, tmp_path: Path, name: str) -> None:
    words, place = COMMANDS[name]
    command = (*words, "--data", tiny, "--out", tmp_path / "out")
    assert kdfast(*command).code == 0
    (student,) = tmp_path.glob(os.path.normpath(f"out/{place}"))
    backup = shutil.copy(student, tmp_path / "backup.pt")
    table = (tmp_path / "out" / "results.jsonl").read_bytes() if name == "sweep" else b""
    for change in (empty, exchange, relabel):
        change(student)
        # As if the process had been killed between the result of the run and its row, or its copy.
        for later in (tmp_path / "out" / "results.jsonl", tmp_path / "out"):
            if later.is_file():
                later.unlink()
        outcome = kdfast(*command)
        assert (outcome.code, outcome.out) == (3, ""), f"{change.__name__}: {outcome}"
        assert re.search(r"student\.pt", outcome.err)
        assert re.search(r"delete \S*student\.pt and run the same command again", outcome.err)
        assert not re.search("download|copy", outcome.err), "the student can be made here"
        assert not (tmp_path / "out").is_file(), "nothing is copied"
        shutil.copy(backup, student)
    assert kdfast(*command).code == 0
    if name == "sweep":
        rows = [json.loads(text) for text in ((tmp_path / "out" / "results.jsonl").read_bytes(), table)]
        assert rows[0]["weights"] == rows[1]["weights"]
        (tmp_path / "out" / "results.jsonl").unlink()
    student.unlink()
    assert kdfast(*command).code == 0
    assert load_model(student).digest == load_model(backup).digest, "the advice makes the same student again"


@pytest.mark.parametrize("name", ["el2n.npy", "mask.npy"])
def test_a_finished_recording_that_has_changed(kdfast, tiny: Path, tmp_path: Path, name: str) -> None:
    command = (*COMMANDS["dynamics"][0], "--data", tiny, "--out", tmp_path / "out")
    assert kdfast(*command).code == 0
    file = tmp_path / "out" / "run-00" / name
    before = file.read_bytes()
    file.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
    outcome = kdfast(*command)
    assert (outcome.code, outcome.out) == (3, ""), outcome
    assert re.search(rf"run-00/{name} is damaged: delete \S*run-00 and record that run again", outcome.err)
    shutil.rmtree(tmp_path / "out" / "run-00")
    assert (kdfast(*command).code, file.read_bytes()) == (0, before), "the advice works"


class Creates:
    """A pickle that makes a folder if an unsafe loader reads it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (self.path,)


STATE: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "code in a checkpoint": ("step-", lambda file, out: torch.save({"step": Creates(out / "ran")}, file)),
    "another checkpoint": ("step-", lambda file, out: torch.save({"step": "7"}, file)),
    "deep nesting": ("latest.json", lambda file, out: file.write_text("[" * 100_000)),
    "a number of 5,000 digits": ("latest.json", lambda file, out: file.write_text('{"step": ' + "1" * 5000 + "}")),
    "another path": ("latest.json", lambda file, out: edit(file, file="../../x.pt")),
    "infinity": ("metrics.jsonl", lambda file, out: file.write_text('{"step": 6, "loss": Infinity}\n')),
    "a wrong type": ("config.json", lambda file, out: edit(file, started_with=[])),
}


def edit(path: Path, /, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


_STOPPED: list[Path] = []


@pytest.fixture
def stopped(kdfast, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed between its last checkpoint and its result; made once."""
    if not _STOPPED:
        out = tmp_path_factory.mktemp("stopped") / "run"
        words = ("distill", "--student", "resnet8", "--alpha", 0, *TRAINING)
        assert kdfast(*words, "--data", tiny, "--keep-checkpoints", "--out", out).code == 0
        (out / "result.json").unlink()
        _STOPPED.append(out)
    return _STOPPED[0]


@pytest.mark.parametrize("name", STATE)
def test_a_stopped_run_whose_state_has_changed(kdfast, tiny: Path, stopped: Path, tmp_path: Path, name: str) -> None:
    from kdfast.files import sha256_file

    out = shutil.copytree(stopped, tmp_path / "run")
    start, change = STATE[name]
    (file,) = out.rglob(f"{start}*")
    change(file, tmp_path)
    if start == "step-":
        edit(out / "checkpoints" / "latest.json", sha256=sha256_file(file))
    words = ("distill", "--student", "resnet8", "--alpha", 0, *TRAINING)
    outcome = kdfast(*words, "--data", tiny, "--out", out)
    assert outcome.code == 3, outcome
    assert re.search(re.escape(start) if start != "step-" else "checkpoint|step-", outcome.err)
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.beton", "test.beton"])
def test_damaged_betons(kdfast, tiny: Path, teacher: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("ffcv")
    from kdfast.data.ffcv.record import write_record
    from kdfast.data.ffcv.write import write_beton
    from kdfast.data.readers.registry import open_source
    from kdfast.files import sha256_file

    source, folder = open_source(tiny), tmp_path / "betons"
    folder.mkdir()
    for part, split in (("train", source.train), ("test", source.test)):
        write_beton(split, folder / f"{part}.beton")
    fields = {"classes": list(source.classes), "views": source.view_spec.to_dict(), "jpeg_quality": None}
    digests = {f"{part}.beton": sha256_file(folder / f"{part}.beton") for part in ("train", "test")}
    write_record(folder, {**fields, "origin": source.fingerprint, "fingerprint": source.fingerprint}, digests)
    assert open_source(folder).fingerprint == source.fingerprint
    file, times = folder / name, (folder / name).stat()
    split = source.train if name == "train.beton" else source.test
    content = bytearray(file.read_bytes())
    content[content.index(split.read([0]).tobytes()) + 7] ^= 64
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    outcome = kdfast("eval", "--data", folder, "--model", teacher)
    assert outcome.code == 3, outcome
    assert re.search(rf"{name} does not hold what was written to it", outcome.err)
