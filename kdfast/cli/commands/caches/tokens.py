"""`kdfast cache import-tokens` and `verify-tokens`: log-probabilities of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdfast.cli import options
from kdfast.cli.output import show
from kdfast.cli.progress import progress
from kdfast.errors import DataError, UsageError


def import_tokens(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Logs of an inference server (.jsonl, .jsonl.gz), arrays (.npz, .safetensors), tables (.parquet, "
            ".arrow), or folders of them.",
            metavar="FILE...",
        ),
    ],
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", help="Number of the teacher's tokens.", min=2, max=2**31 - 1)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the cache; the same command resumes it.")],
    temperature: Annotated[
        float, typer.Option("--temperature", help="What the logits were divided by before the softmax.")
    ] = 1.0,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            help="How many entries of each token are the most probable ones, if others were added, 0 if not known; "
            "responses of servers tell it themselves.",
            min=0,
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--names",
            help="Names of fields and arrays, such as values=logprobs,ids=indices; also of labels, sequence (the "
            "number of the text), lengths and offsets.",
            metavar="NAME=FIELD,...",
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens",
            help="JSON file with the class of each token's text, for responses that name tokens by their texts.",
        ),
    ] = None,
    skip_failed: Annotated[
        bool,
        typer.Option("--skip-failed", help="Keep texts whose requests failed with their numbers, but without tokens."),
    ] = False,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Make a cache of the log-probabilities that a language model gave to the tokens of texts.

    A line, row or list entry is a text. Students read it with kdfast.TokenTeacher.
    """
    from kdfast.teacher.tokens.importing import token_outputs

    with progress("tokens") as report:
        teacher = token_outputs(
            list(files),
            out,
            vocabulary,
            temperature=temperature,
            top_k=top_k,
            names=_parse_names(names),
            tokens=None if tokens is None else _read_tokens(tokens),
            skip_failed=skip_failed,
            force=force,
            progress=report,
        )
    _show(f"imported {_describe(teacher)}", teacher)


def verify_tokens(
    cache: Annotated[Path, typer.Option("--cache", help="Folder of the cache.")],
    config: options.Config = None,
) -> None:
    """Check every file of a cache of log-probabilities against its manifest."""
    from kdfast.teacher.tokens.read import TokenTeacher

    teacher = TokenTeacher.open(cache)
    _show(f"{cache} is whole: {_describe(teacher)}", teacher)


def _describe(teacher: Any) -> str:
    shards = teacher.manifest["shards"]
    entries = sum(shard["entries"] for shard in shards) / max(1, teacher.tokens)
    known = "" if teacher.has_labels else "; the tokens of the texts are not known"
    failed = len(teacher.failed)
    some = (
        "1 text has no tokens, since its request"
        if failed == 1
        else f"{failed} texts have no tokens, since their requests"
    )
    without = f"; {some} failed" if failed else ""
    return f"{len(teacher)} texts with {teacher.tokens} tokens and {entries:.1f} classes per token{known}{without}"


def _show(text: str, teacher: Any) -> None:
    entries = sum(shard["entries"] for shard in teacher.manifest["shards"])
    show(
        text,
        {
            "texts": len(teacher),
            "tokens": teacher.tokens,
            "entries": entries,
            "vocabulary": teacher.vocabulary,
            "labels": teacher.has_labels,
            "failed": len(teacher.failed),
            "cache": str(teacher.path),
        },
    )


def _parse_names(text: str | None) -> dict[str, str]:
    names = {}
    for part in (text or "").split(",") if text else ():
        name, equals, field = part.partition("=")
        if not equals or not name.strip() or not field.strip():
            raise UsageError(f"`names` has {part!r}: pass NAME=FIELD, such as values=logprobs")
        names[name.strip()] = field.strip()
    return names


def _read_tokens(path: Path) -> dict[str, int]:
    from kdfast.files import read_json

    found = read_json(path, advice="write an object with the class of each token's text")
    if not isinstance(found, dict) or not all(isinstance(value, int) for value in found.values()):
        raise DataError(f'{path} holds no object of classes by text: write one, such as {{" the": 262}}')
    return found
