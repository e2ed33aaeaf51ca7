"""Output for scripts and logs: --json, --quiet, --log-json, lines without a terminal, --version."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import kdfast as package
from kdfast.cli import progress as shown
from kdfast.cli.program import app
from kdfast.progress import Remaining

ROOT = typer.main.get_command(app)
TRAINING = ("--epochs", 2, "--batch-size", 20)


def leaves(command: Any, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the commands that do something, by their words."""
    children = getattr(command, "commands", {})
    found = {} if children and not command.invoke_without_command else {" ".join(words): command}
    for name, child in children.items():
        found |= leaves(child, (*words, name))
    return found


LEAVES = {words: command for words, command in leaves(ROOT).items() if words}


@pytest.mark.parametrize("words", LEAVES)
def test_every_command_has_the_common_options(words: str) -> None:
    flags = {flag for parameter in LEAVES[words].params for flag in parameter.opts}
    assert {"--json", "--quiet", "--log-json"} <= flags


def test_prints_the_version_without_importing_torch(kdfast) -> None:
    assert kdfast("--version") == (0, f"kdfast {package.__version__}\n", "")


def test_results_are_one_json_object(kdfast, tiny: Path, teacher: Path, finished: Path, tmp_path: Path) -> None:
    scores, page, idx = tmp_path / "s.npz", tmp_path / "s.html", tmp_path / "idx.npy"
    for words, key in (
        (("doctor",), "operators"),
        (("data", "info", tiny), "fingerprint"),
        (("data", "flip", tiny, tmp_path / "flipped"), "changed"),
        (("teacher", "train", "--data", tiny, "--net", "resnet8", *TRAINING, "--out", tmp_path / "t.pt"), "test_top1"),
        (("cache", "--data", tiny, "--teacher", teacher, "--views", 1, "--out", tmp_path / "c"), "test_top1"),
        (("cache", "verify", "--data", tiny, "--teacher", teacher, "--cache", tmp_path / "c"), "agreement"),
        (("dynamics", "--data", tiny, "--net", "resnet8", *TRAINING, "--out", tmp_path / "d"), "samples"),
        (("dynamics", "--data", tiny, "--net", "resnet8", *TRAINING, "--out", tmp_path / "e", "--dry-run"), "bytes"),
        (("score", "--data", tiny, "--method", "el2n", "--dynamics", tmp_path / "d", "--out", scores), "least"),
        (("prune", "--data", tiny, "--scores", scores, "--fraction", 0.5, "--out", idx), "subsets"),
        (("report", "scores", scores, "--data", tiny, "--out", page), "bytes"),
        (("eval", "--data", tiny, "--model", finished / "student.pt", "--teacher", teacher), "calibration"),
        (("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, *TRAINING, "--out", tmp_path / "r"), "out"),
        (("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, *TRAINING, "--dry-run", "--out", "x"), "of"),
        (("predict", finished, tiny.parent / "x.npy"), None),
    ):
        ran = kdfast(*words, "--json")
        if key is None:
            assert (ran.code, ran.out) == (3, ""), "an error prints no result"
            continue
        assert ran.code == 0, (words, ran.err)
        assert ran.out.count("\n") == 1, words
        assert key in json.loads(ran.out), words
    assert json.loads((tmp_path / "r" / "result.json").read_text())["calibration"]["bins"] == 15


def test_a_sweep_prints_its_rows_or_one_object(kdfast, tiny: Path, tmp_path: Path) -> None:
    command = ("sweep", "--data", tiny, "--student", "resnet8", "--kd", "off", "--fractions", 0.5, "--steps", 2,
               "--batch-size", 20, "--out", tmp_path / "sweep")  # fmt: skip
    ran = kdfast(*command, "--json")
    assert ran.code == 0, ran.err
    (row,) = json.loads(ran.out)["rows"]
    assert row["method"] == "random"
    assert kdfast(*command, "--quiet").out == ""


def test_quiet_prints_errors_only(kdfast, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("quiet: true\n")
    command = ("prune", "--data", tiny, "--fraction", 0.5)
    assert kdfast(*command, "--out", tmp_path / "a.npy", "--quiet") == (0, "", "")
    assert kdfast(*command, "--out", tmp_path / "b.npy", "--config", tmp_path / "c.yaml") == (0, "", "")
    told = kdfast(*command, "--out", tmp_path / "c.npy", "--quiet", "--json")
    assert json.loads(told.out)["of"] == 120
    assert "kept 60" in kdfast(*command, "--out", tmp_path / "d.npy").out, "the next command prints again"
    wrong = kdfast("prune", "--data", "nowhere", "--fraction", 0.5, "--out", tmp_path / "e.npy", "--quiet")
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (3, "", 1)


def train(kdfast, tiny: Path, out: Path, *more: object) -> Any:
    words = ("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, *TRAINING, "--log-every", 3)
    return kdfast(*words, "--out", out, *more)


def test_without_a_terminal_progress_is_lines(kdfast, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shown, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(shown, "LINE_SECONDS", 0.0)
    ran = train(kdfast, tiny, tmp_path / "run", "--eval-every", 1)
    lines = [line for line in ran.err.splitlines() if line.startswith("distill resnet8: ")]
    assert len(lines) == 4, ran.err
    assert re.fullmatch(r"distill resnet8: 3/12, epoch 1/2 loss [\d.]+ \d+ images/s", lines[0])
    assert re.fullmatch(r"distill resnet8: 9/12, epoch 2/2 loss [\d.]+ top-1 [\d.]+ \d+ images/s, \d+ s left", lines[2])
    assert lines[3].startswith("distill resnet8: 12/12, epoch 2/2")
    assert train(kdfast, tiny, tmp_path / "other", "--quiet") == (0, "", "")


def test_lines_keep_their_distance(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    written, lines = [], shown._Lines(10.0)
    for second in range(41):
        now[0] = float(second)
        lines.add(second, 40, lambda done, total, left: written.append((done, left)))
    assert written == [(1, 39.0), (11, 29.0), (21, 19.0), (31, 9.0), (40, 0.0)]
    for second in range(41, 49):
        now[0] = float(second)
        lines.add(40, 40, lambda done, total, left: written.append((done, left)))
    assert len(written) == 5, "processes that end slowly are watched in silence"


def test_a_quick_command_writes_no_line(monkeypatch) -> None:
    monkeypatch.setattr(shown.time, "monotonic", lambda: 5.0)
    written, lines = [], shown._Lines(10.0)
    for done in range(1, 4):
        lines.add(done, 3, lambda *line: written.append(line))
    assert not written


def test_what_an_earlier_process_did_does_not_count_for_the_time_left() -> None:
    now = [0.0]
    remaining = Remaining(lambda: now[0])
    assert remaining.update(900, 1000) is None
    now[0] = 10.0
    assert remaining.update(950, 1000) == pytest.approx(10.0)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (7500, "2 h 5 min")])
def test_times_are_short(seconds: float, text: str) -> None:
    assert shown.format_seconds(seconds) == text


def test_log_json_writes_events(kdfast, tiny: Path, tmp_path: Path) -> None:
    ran = train(kdfast, tiny, tmp_path / "run", "--log-json", "--quiet")
    assert (ran.code, ran.out) == (0, "")
    events = [json.loads(line) for line in ran.err.splitlines()]
    metrics = [event for event in events if event["event"] == "metrics"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{name: event[name] for name in row} for event, row in zip(metrics, rows, strict=False)] == rows
    assert metrics[0]["images_per_second"] > 0
    assert {"test_top1", "test_top5", "test_loss"} <= metrics[-1].keys()


def test_log_json_writes_warnings_and_errors_as_events(kdfast, tiny: Path, tmp_path: Path) -> None:
    ran = train(kdfast, tiny, tmp_path / "run", "--log-json")
    (views,) = [event for event in map(json.loads, ran.err.splitlines()) if event["event"] == "message"]
    assert views["text"].startswith("kdfast: images are padded by 1")
    ran = kdfast("data", "info", tmp_path / "no  data", "--log-json")
    assert (ran.code, ran.out) == (3, "")
    event = json.loads(ran.err)
    assert event["event"] == "message"
    assert event["text"].startswith("kdfast: ")


def test_a_resumed_run_says_where(kdfast, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    from kdfast.distillation.trainer import Trainer

    step = Trainer.train_step

    def stop(self: Trainer, batch: object) -> None:
        step(self, batch)
        if self.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        assert train(kdfast, tiny, tmp_path / "run", "--checkpoint-seconds", 0, "--log-every", 1).code == 75
    ran = train(kdfast, tiny, tmp_path / "run", "--log-every", 1)
    assert (ran.code, "distill resnet8: resuming at step 6 of 12" in ran.err) == (0, True), ran.err
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
