"""Options mean the same in every command; older spellings still work and help does not show them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from kdfast.cli.command import HIDDEN_SPELLINGS
from kdfast.cli.method_help import ScoreCommand
from kdfast.cli.options import choose_precision, parse_precision
from kdfast.cli.program import app
from kdfast.errors import UsageError

ROOT = typer.main.get_command(app)


def commands(command: Any = ROOT, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    yield " ".join(words), command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*words, name))


COMMANDS = dict(commands())
TRAIN = ("--epochs", 1, "--batch-size", 20, "--dry-run")


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_has_a_sentence_of_help(words: str) -> None:
    for parameter in COMMANDS[words].params:
        if not getattr(parameter, "hidden", False):
            assert str(parameter.help).endswith("."), parameter.name


def split_words(text: str) -> set[str]:
    """Return the parts of a text that no line break may divide; a line may end with a hyphen."""
    return set(re.split(r"\s+|(?<=\w-)(?=\w)", text))


@pytest.mark.parametrize("words", COMMANDS)
def test_help_breaks_no_word(words: str) -> None:
    command = COMMANDS[words]
    context = command.make_context("kdfast", [], resilient_parsing=True)
    context.terminal_width = 80
    shown = command.get_help(context).splitlines()
    assert max(map(len, shown)) <= 80
    printed = split_words("\n".join(shown))
    texts = [command.help, command.epilog, *(p.help for p in command.params if not getattr(p, "hidden", False))]
    if isinstance(command, ScoreCommand):
        texts += [entry.summary for entries in command.registries().values() for entry in entries.values()]
    for text in filter(None, texts):
        assert split_words(text) <= printed


def test_help_shows_paths_alike_in_every_command(kdfast) -> None:
    for words, command in COMMANDS.items():
        shown = kdfast(*words.split(), "--help").out
        for name in {"cache", "dynamics", "teacher", "subset", "out"} & {p.name for p in command.params}:
            assert re.search(rf"\b{name} <?path\b", shown, re.IGNORECASE), (words, name)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        *((word, word) for word in ("auto", "fp32", "bf16", "fp16")),
        *(("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")),
    ],
)
def test_precision_accepts_torch_names(given: str, word: str) -> None:
    assert parse_precision(given) == word


def test_rejects_an_unknown_precision() -> None:
    with pytest.raises(UsageError, match=r"'bf61': did you mean 'bf16'\? pass one of auto, fp32, bf16, fp16"):
        parse_precision("bf61")


def test_precision_has_the_same_words_in_every_command() -> None:
    found = [(words, p) for words, command in COMMANDS.items() for p in command.params if p.name == "precision"]
    commands = {"cache", "teacher train", "dynamics", "distill", "plan", "sweep", "reproduce"}
    assert {words for words, _ in found} == commands
    for _, parameter in found:
        assert parameter.default == "fp32"
        assert parameter.metavar.startswith("auto|fp32|bf16")


@pytest.mark.parametrize("fast", [True, False])
def test_slow_precisions_are_said_to_be_slow(
    fast: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kdfast.device.bf16_is_fast", lambda device: fast)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == ("bf16" if fast else "fp32")
    assert choose_precision("bf16", cpu) == "bf16"
    said = capsys.readouterr().err
    assert said == (
        "" if fast else "kdfast: bf16 is slower than fp32 on this CPU; --precision auto chooses the faster one\n"
    )


@pytest.mark.parametrize(("new", "old"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_both_words_for_a_precision_write_the_same_cache(kdfast, tiny, teacher, tmp_path, new, old) -> None:
    manifests = []
    for word in (new, old):
        out = tmp_path / word
        made = kdfast("cache", "--data", tiny, "--teacher", teacher, "--views", 2, "--precision", word, "--out", out)
        assert made.code == 0, made.err
        manifests.append(json.loads((out / "manifest.json").read_text()))
        assert manifests[-1]["precision"] == old
    files = sorted(path.name for path in (tmp_path / new).glob("*.npy"))
    assert files
    for name in files:
        assert (tmp_path / new / name).read_bytes() == (tmp_path / old / name).read_bytes()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        *((word, f"--precision is '{word}', but a cache is computed in fp32 or bf16") for word in ("fp16", "float16")),
        ("bf61", "--precision is 'bf61': did you mean 'bf16'?"),
    ],
)
def test_a_cache_rejects_other_precisions(kdfast, tiny: Path, teacher: Path, tmp_path: Path, given, reason) -> None:
    command = ("cache", "--data", tiny, "--teacher", teacher, "--out", tmp_path / "c")
    (tmp_path / "c.yaml").write_text(f"precision: {given}\n")
    for more in (("--precision", given), ("--config", tmp_path / "c.yaml")):
        outcome = kdfast(*command, *more)
        assert (outcome.code, "pass one of auto, fp32, bf16\n" in outcome.err) == (2, True)
        assert reason in outcome.err
        assert ("did you mean" in outcome.err) == (given == "bf61")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("new", "old"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_both_words_for_a_precision_plan_the_same_run(kdfast, tiny: Path, tmp_path: Path, new: str, old: str) -> None:
    command = ("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, *TRAIN, "--out", tmp_path / "run")
    plans = [kdfast(*command, "--precision", word) for word in (new, old)]
    assert plans[0].code == 0, plans[0].err
    assert plans[0] == plans[1]
    assert f'"precision": "{new}"' in plans[0].out


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (("teacher", "train"), ("--out", "t.pt")),
        (("dynamics",), ("--out", "dyn")),
        (("distill",), ("--alpha", 0, "--out", "run")),
        (("sweep",), ("--kd", "off", "--steps", 2, "--fractions", 0.5, "--out", "sweep")),
    ],
    ids=lambda value: value[0],
)
def test_net_and_student_name_the_same_option(
    kdfast, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], more: tuple[Any, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    length = () if words == ("sweep",) else ("--epochs", 1)
    command = (*words, "--data", tiny, "--batch-size", 20, *length, "--dry-run", *more)
    outcomes = [kdfast(*command, flag, "resnet8") for flag in ("--net", "--student")]
    for key in ("net", "student"):
        Path(f"{key}.yaml").write_text(f"{key}: resnet8\n")
        outcomes.append(kdfast(*command, "--config", f"{key}.yaml"))
    assert outcomes[0].code == 0, outcomes[0].err
    assert all(outcome == outcomes[0] for outcome in outcomes)
    typos = [kdfast(*command, flag, "resnet9") for flag in ("--net", "--student")]
    assert typos[0] == typos[1]
    assert (typos[0].code, "did you mean 'resnet" in typos[0].err) == (2, True)


@pytest.mark.parametrize("words", [w for w, c in COMMANDS.items() if any(p.name in HIDDEN_SPELLINGS for p in c.params)])
def test_help_shows_one_spelling_of_the_network(kdfast, words: str) -> None:
    help_text = kdfast(*words.split(), "--help").out
    assert ("--net NAME" in help_text) != ("--student NAME" in help_text)
    assert "Network, such as resnet8; torchvision:NAME; timm:NAME; hf:FOLDER" in " ".join(help_text.split())


def prune(kdfast, tiny: Path, out: Path, *flags: object) -> tuple[bytes, dict[str, Any]]:
    outcome = kdfast("prune", "--data", tiny, "--fraction", 0.25, "--seed", 2, *flags, "--out", out)
    assert outcome.code == 0, outcome.err
    about = json.loads(out.with_suffix(".json").read_text())
    for varying in ("seconds", "score_seconds", "sha256_of_the_rest"):
        del about[varying]
    return out.read_bytes(), about


@pytest.fixture
def uneven(tmp_path: Path, tiny: Path) -> Path:
    """The tiny data with classes of 60, 40 and 20 samples."""
    arrays = dict(np.load(tiny))
    arrays["train_labels"] = np.repeat([0, 1, 2], [60, 40, 20])
    np.savez(tmp_path / "uneven.npz", **arrays)
    return tmp_path / "uneven.npz"


@pytest.mark.parametrize(
    ("balance", "stored", "older"),
    [
        ("proportional", "balanced", [(), ("--balanced",)]),
        ("none", "unbalanced", [("--unbalanced",)]),
        ("equal", "equal", [("--equal",), ("--equal", "--balanced")]),
    ],
)
def test_balance_replaces_three_flags(
    kdfast, uneven: Path, tmp_path: Path, balance: str, stored: str, older: list[tuple[str, ...]]
) -> None:
    expected = prune(kdfast, uneven, tmp_path / "idx.npy", "--balance", balance)
    assert expected[1]["parameters"]["balance"] == stored
    for flags in older:
        assert prune(kdfast, uneven, tmp_path / "idx.npy", *flags) == expected
        assert prune(kdfast, uneven, tmp_path / "idx.npy", "--balance", balance, *flags) == expected


@pytest.mark.parametrize(
    ("text", "balance"),
    [
        ("balance: none", "unbalanced"),
        ("unbalanced: true", "unbalanced"),
        ("unbalanced: false", "balanced"),
        ("balanced: false", "unbalanced"),
        ("equal: true", "equal"),
        ("balance: equal", "equal"),
    ],
)
def test_config_files_accept_both_spellings_of_balance(
    kdfast, uneven: Path, tmp_path: Path, text: str, balance: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    _, about = prune(kdfast, uneven, tmp_path / "idx.npy", "--config", tmp_path / "c.yaml")
    assert about["parameters"]["balance"] == balance


@pytest.mark.parametrize("text", ["balanced: false", "unbalanced: true", "equal: true", "balance: none"])
@pytest.mark.parametrize(
    ("flags", "balance"),
    [
        (("--balance", "proportional"), "balanced"),
        (("--balanced",), "balanced"),
        (("--balance", "equal"), "equal"),
        (("--equal",), "equal"),
        (("--unbalanced",), "unbalanced"),
    ],
)
def test_the_command_line_overrides_the_balance_of_a_config_file(
    kdfast, uneven: Path, tmp_path: Path, text: str, flags: tuple[str, ...], balance: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    _, about = prune(kdfast, uneven, tmp_path / "idx.npy", "--config", tmp_path / "c.yaml", *flags)
    assert about["parameters"]["balance"] == balance


def test_rejects_contradicting_balances_in_a_config_file(kdfast, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("balance: equal\nbalanced: false\n")
    command = ("prune", "--data", tiny, "--fraction", 0.25, "--config", tmp_path / "c.yaml")
    outcome = kdfast(*command, "--out", tmp_path / "idx.npy")
    assert (outcome.code, "--balance equal and --unbalanced exclude each other" in outcome.err) == (2, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--equal", "--unbalanced"), "--unbalanced and --equal exclude each other: pass one of them"),
        (("--balance", "none", "--equal"), "--balance none and --equal exclude each other: pass one"),
        (("--balance", "equal", "--balanced"), "--balance equal and --balanced exclude each other"),
        (("--balance", "equl"), "--balance is 'equl': did you mean 'equal'? pass one of proportional, equal, none"),
    ],
)
def test_rejects_contradicting_balances(kdfast, tiny: Path, tmp_path: Path, flags, message: str) -> None:
    outcome = kdfast("prune", "--data", tiny, "--fraction", 0.25, *flags, "--out", tmp_path / "idx.npy")
    assert outcome.code == 2
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_help_of_prune_hides_older_flags(kdfast) -> None:
    text = kdfast("prune", "--help").out
    assert "--balance proportional|equal|none" in text
    assert not any(flag in text for flag in ("--balanced", "--unbalanced", "--equal"))
