"""Files of options: a written file is read back to the same settings, and the config.json of a run repeats it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from kdfast.cli.program import app

Run = Callable[..., Any]

COMMANDS = [("distill",), ("teacher", "train"), ("dynamics",), ("sweep",)]

# Values of options that are words; those of others follow from the type of their default.
WORDS = {
    "schedule": "cosine", "optimizer": "adamw", "augment": "trivial", "alpha": "0.25", "kd_term": "dkd:beta=2.0",
    "kd_weight": "0.5", "kd_preset": "tuned", "tap": "student.stage1=layer1", "precision": "bf16", "resume": "never",
    "loader": "ffcv", "order": "imagefolder", "device": "cpu", "record": "batch", "kd": "on", "methods": "random,el2n",
    "fractions": "0.2,0.4", "seeds": "1,2", "scores": "own=scores.npy", "key": "own=loss", "higher": "own=easy",
    "net_arg": "width=3", "split": "0.2", "track": "tensorboard",
    "teacher_net": "own.py:Net",
}  # fmt: skip


def find(words: tuple[str, ...]) -> Any:
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    return command


def settings(words: tuple[str, ...], arguments: list[str]) -> dict[str, Any]:
    """Return the parameters that a command gets for a command line."""
    context = find(words).make_context("kdfast", arguments)
    return {name: value for name, value in context.params.items() if name not in ("config", "write_config")}


def changed_value(parameter: Any) -> list[str]:
    """Return words of a command line that set an option to something other than its default."""
    flag, default = max(parameter.opts, key=len), parameter.default
    if default is True:
        return [max(parameter.secondary_opts, key=len)]
    if default is False:
        return [flag]
    if parameter.name in WORDS:
        return [flag, WORDS[parameter.name]]
    if isinstance(default, (int, float)):
        return [flag, str(default + 1)]
    return [flag, "3"]  # a path, or a number without a default


def options(words: tuple[str, ...]) -> list[Any]:
    omitted = ("config", "write_config", "help", "list_terms")
    return [p for p in find(words).params if p.name not in omitted and not getattr(p, "hidden", False)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_is_read_back_as_it_was_written(kdfast: Run, words: tuple[str, ...], tmp_path: Path) -> None:
    given = [word for parameter in options(words) for word in changed_value(parameter)]
    file = tmp_path / "c.yaml"
    outcome = kdfast(*words, *given, "--write-config", file)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert settings(words, ["--config", str(file)]) == settings(words, given)
    text = file.read_text()
    for parameter in options(words):
        assert f"\n{max(parameter.opts, key=len).lstrip('-')}:" in text


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_defaults_are_read_back_too(kdfast: Run, words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    assert kdfast(*words, "--write-config", file).code == 0
    required = [word for p in options(words) if p.required for word in changed_value(p)]
    assert settings(words, ["--config", str(file), *required]) == settings(words, required)
    lines = file.read_text().splitlines()
    for parameter in options(words):
        key = max(parameter.opts, key=len).lstrip("-")
        place = next(i for i, line in enumerate(lines) if line.lstrip("# ").startswith(f"{key}:"))
        assert lines[place - 1].startswith("# ")


def test_a_written_file_starts_from_another(kdfast: Run, tmp_path: Path) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("lr: 0.3\nepochs: 7\n")
    assert kdfast("distill", "--write-config", new, "--config", old, "--epochs", 9).code == 0
    found = settings(("distill",), ["--config", str(new), "--data", "d", "--student", "s", "--out", "o"])
    assert (found["lr"], found["epochs"]) == (0.3, 9)
    again = kdfast("distill", "--write-config", new)
    assert (again.code, "exists; choose another --write-config" in again.err) == (4, True)
    assert "is no number" in kdfast("distill", "--lr", "fast", "--write-config", tmp_path / "x.yaml").err
    assert not (tmp_path / "x.yaml").exists()


def test_the_config_of_a_run_repeats_it(kdfast: Run, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = ["--epochs", 1, "--batch-size", 40, "--lr", 0.002, "--momentum", 0.8, "--weight-decay", 1e-5, "--schedule",
             "cosine", "--warmup-epochs", 0.5, "--optimizer", "adamw", "--label-smoothing", 0.1, "--ema", 0.9, "--clip",
             2, "--augment", "randaugment:n=1,m=4", "--mixup", 0.3, "--cutmix", 1, "--alpha", 0.6, "--temperature", 3,
             "--ce-weight", 0.7, "--kd-term", "jsd:beta=0.25", "--kd-weight", 0.4, "--kd-warmup-epochs", 0.5, "--views",
             5, "--view-seed", 2, "--seed", 3, "--no-cuda-graph"]  # fmt: skip
    first = kdfast("distill", "--data", tiny, "--student", "resnet8", "--teacher", teacher, *given, "--out", run)
    assert first.code == 0, first.err
    # Another setting would be refused, as the folder holds a run; a run that is not finished would be continued.
    before = (run / "student.pt").stat().st_mtime_ns
    again = kdfast("distill", "--config", run / "config.json", "--out", run)
    assert (again.code, again.out) == (0, first.out), again.err
    assert (run / "student.pt").stat().st_mtime_ns == before
    refused = kdfast("distill", "--config", run / "config.json", "--ema", 0.8, "--out", run)
    assert (refused.code, "--ema was 0.9, is 0.8" in refused.err) == (2, True), refused.err
    other = kdfast("dynamics", "--config", run / "config.json", "--out", tmp_path / "d")
    assert (other.code, "which this command does not have" in other.err) == (2, True), other.err


def test_a_length_on_the_command_line_takes_precedence(kdfast: Run, tiny: Path, tmp_path: Path) -> None:
    command = ("distill", "--data", tiny, "--student", "resnet8", "--batch-size", 40, "--alpha", 0, "--dry-run")
    file = tmp_path / "o.yaml"

    def planned(*options: object) -> int:
        outcome = kdfast(*command, "--config", file, "--out", tmp_path / "o", *options)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)["steps"]

    # 120 samples are 3 batches of 40.
    file.write_text("epochs: 7\n")
    assert (planned(), planned("--steps", 5), planned("--epochs", 2)) == (21, 5, 6)
    file.write_text("steps: 7\n")
    assert (planned(), planned("--steps", 5), planned("--epochs", 2)) == (7, 5, 6)
    file.write_text("steps: 7\nepochs: 2\n")
    both = kdfast(*command, "--config", file, "--out", tmp_path / "o")
    assert (both.code, "--epochs and --steps both say how long to train" in both.err) == (2, True)


def test_numbers_without_a_default_are_written_as_numbers(kdfast: Run, tmp_path: Path) -> None:
    file = tmp_path / "o.yaml"
    assert kdfast("distill", "--steps", 7, "--view-seed", 3, "--ce-weight", 0.5, "--write-config", file).code == 0
    found = yaml.safe_load(file.read_text())
    assert (found["steps"], found["view-seed"], found["ce-weight"], "epochs" in found) == (7, 3, 0.5, False)
    wrong = kdfast("distill", "--epochs", "abc", "--write-config", tmp_path / "x.yaml")
    assert (wrong.code, "'abc' is no integer" in wrong.err, (tmp_path / "x.yaml").exists()) == (2, True, False)


def test_the_config_of_a_teacher_and_damaged_ones(kdfast: Run, tmp_path: Path) -> None:
    started = {"data": "digits", "loader": "resident", "compile": False, "cuda_graph": True}
    plain = {"student": "resnet8", "epochs": 2, "batch_size": 30, "alpha": 0.0, "temperature": 4.0, "view_seed": 0}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**plain, "data": "ab" * 32, "started_with": started}))
    for words in (("teacher", "train"), ("dynamics",), ("distill",)):
        found = settings(words, ["--config", str(file), "--out", "o"])
        assert (found["data"], found["epochs"], found["batch_size"]) == ("digits", 2, 30)
        assert found.get("net", found.get("student")) == "resnet8"
    file.write_text(json.dumps({**plain, "steps": 7, "data": "ab" * 32, "started_with": started}))
    found = settings(("distill",), ["--config", str(file), "--out", "o"])
    assert (found["epochs"], found["steps"]) == (None, 7)
    assert "have: use the command that made" in kdfast("dynamics", "--config", file, "--out", tmp_path / "o").err
    file.write_text(json.dumps({"started_with": started, "terms": [1]}))
    damaged = kdfast("distill", "--config", file, "--out", tmp_path / "o")
    assert (damaged.code, "is the config.json of a run, and damaged" in damaged.err) == (2, True), damaged.err
