"""`kdfast teacher flatten`: its file and line, resuming after kill -9, and what it refuses."""

import json
import re
import time
from pathlib import Path

import pytest
import torch

from kdfast.nets.checkpoint import load_model
from kdfast.teacher import flatten as flatten_package

QUICK = ("--iterations", 20, "--batch-size", 16, "--held", 0.5)


def command(tiny: Path, teacher: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("teacher", "flatten", "--data", tiny, "--teacher", teacher, "--out", out, *QUICK, *more)


def state_dict(path: Path) -> dict[str, bytes]:
    return {name: x.numpy().tobytes() for name, x in torch.load(path, weights_only=True)["state_dict"].items()}


def test_writes_an_ordinary_model(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "flat.pt"
    ran = kdfast(*command(tiny, teacher, out, "--sharpness", "fsam", "--seed", 2))
    assert ran.code == 0, ran.err
    assert [path.name for path in out.parent.iterdir()] == ["flat.pt"]
    pattern = (
        r"60 of 120 training samples held out: loss [\d.]+ before, [\d.]+ after; top-1 [\d.]+ before, [\d.]+ after\n"
        rf"20 steps \(fsam\), 600 images = 5.00 epochs of the training split, in [\d.]+ s; written to {out}\n"
    )
    assert re.fullmatch(pattern, ran.out)
    about = load_model(out).metadata["flattened"]
    assert (about["teacher"], about["seed"]) == (load_model(teacher).digest, 2)
    evaluated = kdfast("eval", "--data", tiny, "--model", out)
    assert evaluated.code == 0, evaluated.err


def test_the_same_command_again_writes_nothing(kdfast, tiny: Path, teacher: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "flat.pt"
    first = kdfast(*command(tiny, teacher, out))
    assert first.code == 0, first.err
    written = out.read_bytes()
    # As if the process had been killed between its last two writes.
    (tmp_path / "flat.pt.state").write_bytes(b"left over")
    monkeypatch.setattr(flatten_package, "flatten_teacher", lambda *_, **__: pytest.fail("the work began"))
    again = kdfast(*command(tiny, teacher, out))
    assert (again.code, again.out) == (0, first.out)
    assert out.read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["flat.pt"]
    other = kdfast(*command(tiny, teacher, out, "--seed", 1))
    assert other.code == 4
    assert "exists and is not the result of this command; choose another --out" in other.err
    assert out.read_bytes() == written


def test_dry_run_prints_the_plan_and_writes_nothing(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    ran = kdfast(*command(tiny, teacher, tmp_path / "new" / "flat.pt", "--sharpness", "lpf", "--dry-run"))
    assert ran.code == 0, ran.err
    plan = json.loads(ran.out)
    assert (plan["sharpness"], plan["rho"], plan["held_out"]) == ("lpf", 0.002, 60)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--sharpness", "sam"), 2, "did you mean 'fsam'"),
        (("--sharpness", "none", "--rho", 0.1), 2, "--rho is 0.1, but --sharpness none moves nothing"),
        (("--held", 0.6), 2, "--held is 0.6"),
        (("--iterations", 0), 2, "--iterations is 0"),
        (("--views", 1000), 2, "--views is 1000, but the data has"),
        (("--lr", 1e9), 5, "lower --lr or --rho"),
    ],
)
def test_bad_settings_are_refused(
    kdfast, tiny: Path, teacher: Path, tmp_path: Path, more: tuple[object, ...], code: int, message: str
) -> None:
    ran = kdfast(*command(tiny, teacher, tmp_path / "flat.pt", *more))
    assert ran.code == code, ran.err
    assert message in ran.err
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_something_else_are_refused(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    before = teacher.read_bytes()
    ran = kdfast(*command(tiny, teacher, teacher))
    assert ran.code == 4
    assert "which is also --teacher" in ran.err
    assert teacher.read_bytes() == before
    for name in ("flat.pt", "flat.pt.state"):
        (tmp_path / name).write_bytes(b"years of work")
        for dry in ((), ("--dry-run",)):
            ran = kdfast(*command(tiny, teacher, tmp_path / "flat.pt", *dry))
            assert ran.code == 4, ran.err
            assert name in ran.err
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"years of work"]
        (tmp_path / name).unlink()


def test_resumes_after_kill_9_to_the_same_bits(fork, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    def start(out: Path):
        return fork(*command(tiny, teacher, out, "--iterations", 50, "--checkpoint-seconds", 0))

    whole, cut, state = tmp_path / "whole.pt", tmp_path / "cut.pt", tmp_path / "cut.pt.state"
    assert start(whole).wait(timeout=120) == 0
    process, deadline = start(cut), time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    assert process.wait() != 0
    assert not cut.exists()
    assert 0 < torch.load(state, weights_only=True)["step"] < 50
    assert start(cut).wait(timeout=120) == 0
    assert state_dict(cut) == state_dict(whole)
    assert not state.exists()
