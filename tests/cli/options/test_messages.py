"""The library names arguments in backticks; the command line shows the options that set them."""

from pathlib import Path

import pytest
import typer

from kdfast.cli.messages import find_command, translate
from kdfast.cli.program import app
from kdfast.errors import UsageError, describe_changes, did_you_mean

ROOT = typer.main.get_command(app)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("distill --data digits", "distill"),
        ("teacher train --net resnet8", "train"),
        ("cache --data digits --out verify", "cache"),
        ("cache verify --cache c", "verify"),
        ("report scores s.npz", "scores"),
        ("nothing", None),
        ("", None),
    ],
)
def test_finds_the_command_that_a_line_runs(line: str, name: str | None) -> None:
    command = find_command(ROOT, line.split())
    assert command is (ROOT if name is None else command)
    assert name is None or command.name == name


@pytest.mark.parametrize(
    ("line", "message", "expected"),
    [
        ("distill", "`batch_size` is 0: pass at least 1", "--batch-size is 0: pass at least 1"),
        ("distill", "pass `cache` or\n  `teacher`", "pass --cache or --teacher"),
        ("distill", "`student` is 'resnet9'", "--student is 'resnet9'"),
        ("teacher train", "`student` is 'resnet9'", "--net is 'resnet9'"),
        ("dynamics", "`student` is 'resnet9'", "--net is 'resnet9'"),
        ("prune", "`fraction` is 2.0", "--fraction is 2.0"),
        ("sweep", "`fraction` is 2.0 and `seed` is -1", "--fractions is 2.0 and --seeds is -1"),
        ("eval", "`as_json` and `model`", "--json and --model"),
        ("report scores", "`file` holds nothing", "SCORES holds nothing"),
        ("eval", "`batch_size` and `x_1` stay names; make one with `kdfast cache`",
         "batch_size and x_1 stay names; make one with `kdfast cache`"),
        ("", "`batch_size` is 0", "batch_size is 0"),
    ],
)  # fmt: skip
def test_replaces_argument_names_by_options(line: str, message: str, expected: str) -> None:
    assert translate(message, find_command(ROOT, line.split())) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nope", ""), ("xyz", ""), ("randm", "did you mean 'random'? "), ("el2m", "did you mean 'el2n'? ")],
)
def test_suggests_only_similar_names(name: str, expected: str) -> None:
    assert did_you_mean(name, ["random", "el2n", "forgetting", "grand"]) == expected


def test_changes_are_named_once_with_both_values() -> None:
    digests = ["0123456789abcdef" * 4, "fedcba9876543210" * 4]
    old = {"lr": 0.1, "same": 1, "teacher": {"digest": digests[0], "net": "a"}, "gone": None, "steps": list(range(20))}
    new = {"lr": 0.2, "same": 1, "teacher": {"digest": digests[1], "net": "a"}, "steps": [0]}
    assert describe_changes(old, new) == (
        '`lr` was 0.1, is 0.2; `teacher` (digest) was "0123456789ab...", is "fedcba987654..."; '
        "`steps` was [0, 1, ..., 19], is [0]"
    )


def test_the_program_prints_the_translated_message(kdfast, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UsageError("`model` is wrong:\n pass `size`, not `sizes`")

    monkeypatch.setattr("kdfast.nets.checkpoint.load_model", fail)
    outcome = kdfast("eval", "--data", tiny, "--model", "m.pt")
    assert (outcome.code, outcome.err) == (2, "kdfast: --model is wrong: pass --size, not sizes\n")
