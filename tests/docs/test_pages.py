"""The code in the README and the documentation runs, and prints the output that the pages show.

The ```python blocks of a page run in order in one namespace. In ```console blocks, lines that start with `$ kdfast` run
as commands in this process. The lines of a ```text block, or those below a command, must be printed in this order;
`...` stands for any lines. Blocks marked ```python no-run are skipped, because they need files that the page does not
create.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kdfast
from kdfast.cli.program import app
from kdfast.nets import NETS
from kdfast.ops import backends
from kdfast.ops.grad_norms.layers import REGISTERED
from kdfast.pruning.rules.registry import RULES
from kdfast.pruning.scores.registry import SCORES
from kdfast.pruning.selectors import SELECTORS

ROOT = Path(__file__).parents[2]
REGISTRIES = {
    "NETS": NETS,
    "SCORES": SCORES,
    "RULES": RULES,
    "SELECTORS": SELECTORS,
    "TABLE": backends.TABLE,
    "DTYPES": backends.DTYPES,
    "REGISTERED": REGISTERED,
}
# The registry to which each page must add an entry.
EXTENSIONS = {
    "network": "NETS",
    "score": "SCORES",
    "rule": "RULES",
    "kernel": "TABLE",
    "layer": "REGISTERED",
    "loss": None,
    "study": None,
}
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
GUIDES = sorted(path.stem for path in (ROOT / "docs/guides").glob("*.md"))
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>\w.*)?$")
# Progress of long work, which a fast machine does not print.
_PROGRESS = re.compile(r"^\w+( \S+)?: \d+/\d+\b.*\n", re.MULTILINE)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, the text inside, and the line where it starts."""

    info: str
    text: str
    line: int


def read_blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    lines = page.read_text().splitlines()
    start: int | None = None
    indent = info = ""
    for number, line in enumerate(lines):
        match = _FENCE.match(line)
        if start is None and match and match["info"]:
            start, indent, info = number + 1, match["indent"], match["info"].strip()
        elif start is not None and line.rstrip() == f"{indent}```":
            yield Block(info, "\n".join(text.removeprefix(indent) for text in lines[start:number]), start + 1)
            start = None


def run_page(page: Path, *, commands: bool = False, any_number: bool = False) -> int:
    """Run the blocks of a page in the current folder and check their output.

    Args:
        page: The Markdown file.
        commands: Whether to run console blocks as well.
        any_number: Whether printed numbers may differ from the page, as results of training do.

    Returns:
        The number of blocks that ran.
    """
    namespace: dict[str, object] = {"__name__": "docs"}
    printed, ran = None, 0
    for block in read_blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.info == "python":
            # With leading newlines, line numbers in tracebacks are those of the page.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(code, namespace)
            printed, ran = stream.getvalue(), ran + 1
        elif block.info == "text" and printed is not None:
            check_output(block.text, printed, where, any_number)
            printed = None
        elif block.info == "console" and commands:
            for command, expected in split_commands(block.text):
                result = CliRunner().invoke(app, shlex.split(command), catch_exceptions=False)
                assert result.exit_code == 0, f"{where}: {command}\n{result.output}"
                check_output(expected, _PROGRESS.sub("", result.output), where, any_number)
                ran += 1
    return ran


def split_commands(text: str) -> Iterator[tuple[str, str]]:
    """Yield the arguments of each `$ kdfast` command, and the text below it."""
    text = re.sub(r" *\\\n *", " ", text)
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        if command.startswith("kdfast "):
            yield command.removeprefix("kdfast ").partition("  #")[0], expected


def check_output(expected: str, printed: str, where: str, any_number: bool) -> None:
    """Check that the lines of a page are printed in this order."""
    wanted, given = (_normalize(text, any_number) for text in (expected, printed))
    position, adjacent = 0, False
    for line in wanted:
        if line == "...":
            adjacent = False
            continue
        rest = given[position : position + 1] if adjacent else given[position:]
        assert line in rest, f"{where}: {line!r} was not printed here:\n{printed}"
        position, adjacent = position + rest.index(line) + 1, True


def _normalize(text: str, any_number: bool) -> list[str]:
    """Return the non-empty lines with single spaces, and with every number replaced by 0 if numbers may differ."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [_NUMBER.sub("0", line) if any_number else line for line in lines if line]


@pytest.fixture(autouse=True)
def _enter_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")  # the width of help texts


@pytest.fixture
def registries():
    """The registries; entries added by a page are removed afterwards."""
    saved = {name: copy.copy(registry) for name, registry in REGISTRIES.items()}
    yield REGISTRIES
    for name, registry in REGISTRIES.items():
        registry.clear()
        registry.update(saved[name])
    backends._resolve.cache_clear()


@pytest.mark.parametrize("page", EXTENSIONS)
def test_extension_page_adds_an_entry_and_uses_it(page, registries):
    before = {name: set(registry) for name, registry in registries.items()}
    assert run_page(ROOT / f"docs/extend/{page}.md") >= 2
    changed = {name for name, registry in registries.items() if set(registry) != before[name]}
    expected = EXTENSIONS[page]
    assert expected in changed if expected else not changed


def test_all_extension_pages_are_tested():
    assert {path.stem for path in (ROOT / "docs/extend").glob("*.md")} == {"index", *EXTENSIONS}


# Guides whose Python code reads what their commands write.
WITH_COMMANDS = {"export-and-predict": 6, "automate": 6, "language-models": 11}


@pytest.mark.parametrize("page", [page for page in GUIDES if page not in WITH_COMMANDS])
def test_guide_code_runs(page):
    run_page(ROOT / f"docs/guides/{page}.md")


@pytest.mark.filterwarnings("ignore:photos has no test split")
def test_own_network_guide_prints_the_output_it_shows():
    assert run_page(ROOT / "docs/guides/your-own-network.md", commands=True, any_number=True) >= 5


@pytest.mark.parametrize("page", ["your-own-logits", "your-own-scores"])
def test_guides_to_own_files_print_the_output_they_show(page):
    assert run_page(ROOT / f"docs/guides/{page}.md", commands=True, any_number=True) >= 5


@pytest.mark.parametrize(("page", "least"), WITH_COMMANDS.items())
def test_guides_to_results_print_the_output_they_show(page, least):
    assert run_page(ROOT / f"docs/guides/{page}.md", commands=True, any_number=True) >= least


def test_readme_code_runs():
    assert run_page(ROOT / "README.md") == 1


def test_tutorial_prints_the_output_it_shows():
    assert run_page(ROOT / "docs/tutorial.md", commands=True, any_number=True) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    text = page.read_text()
    named = re.findall(r"`((?:kdfast|csrc|bench|tests|docs|\.ci)/[\w./-]+)`", text)
    linked = re.findall(r"\]\((?!http)([\w./-]+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    missing = [name for name in named if not (ROOT / name).exists() and not re.search("row_entropy|_build", name)]
    missing += [link for link in linked if not (page.parent / link).exists()]
    assert not missing


def test_api_reference_lists_every_public_name():
    text = (ROOT / "docs/reference/api.md").read_text()
    missing = {name for name in kdfast.__all__ if f":: kdfast.{name}\n" not in text}
    assert missing == {"__version__"}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_accuracy_plot_is_drawn_from_recorded_rows():
    command = [sys.executable, ROOT / "bench/plot_accuracy.py", "--out", "accuracy.svg"]
    subprocess.run(command, check=True, env={**os.environ, "MPLBACKEND": "agg"})
    assert "<svg" in Path("accuracy.svg").read_text()
