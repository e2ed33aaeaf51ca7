"""Make a cache of log-probabilities that another program computed."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.errors import CacheMismatch, DataError, UsageError
from kdfast.files import sha256_file, sha256_json
from kdfast.progress import Progress
from kdfast.teacher.manifest import MANIFEST
from kdfast.teacher.tokens.failures import FailedRequest
from kdfast.teacher.tokens.files import Text, find_files, read_texts
from kdfast.teacher.tokens.layout import check_folder, delete_tokens, make_plan
from kdfast.teacher.tokens.read import TokenTeacher
from kdfast.teacher.tokens.records import DEFAULT_NAMES, RecordReader
from kdfast.teacher.tokens.sequence import NO_TEXTS, Rows, TextCheck, failed_rows
from kdfast.teacher.tokens.write import TokenWriter

_ARRAY_NAMES = ("lengths", "offsets")

TokenSource = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Iterable[Mapping[str, Any]]


def token_outputs(
    source: TokenSource,
    out: str | os.PathLike[str],
    vocabulary: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    names: Mapping[str, str] | None = None,
    tokens: Mapping[str, int] | None = None,
    skip_failed: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> TokenTeacher:
    """Make a cache of a language model's log-probabilities, and open it. The same call resumes.

    Each record is a text: a line of a .jsonl file, a row of a table, or a mapping. It holds one of

    - a response of OpenAI's or vLLM's (chat) completions, or of llama.cpp's, with `logprobs`, also a line of a batch;
    - vLLM's `prompt_logprobs`, which count if there are both;
    - SGLang's `meta_info` with `input_top_logprobs` or `output_top_logprobs`;
    - `values` and `ids`, lists of each token's log-probabilities and classes, and maybe `labels`, the tokens.

    A .npz or .safetensors file holds arrays `values` and `ids`, (S, L, k), or (N, k) with `lengths` (S,), or (E,) with
    `offsets` (N + 1,) and `lengths` (S,), and maybe `labels`, (S, L) or (N,), and `sequence` (S,).

    Args:
        source: Paths of such files, or of folders of them, such as one that Hugging Face's `save_to_disk` wrote; or
            records, such as a data set of Hugging Face. Texts are numbered from 0 on, unless they have a field
            `sequence` with a number.
        out: The cache's folder; created if missing.
        vocabulary: Number of the teacher's tokens.
        temperature: What the logits were divided by before the softmax.
        top_k: How many entries of each token are the most probable classes, if others were added; 0: not known.
            Responses of servers tell it themselves, and it limits what they tell.
        names: Names of the fields `values`, `ids`, `labels`, `sequence`, and of the array `lengths` or `offsets`, where
            they differ.
        tokens: Class of each token's text, for responses that name tokens by their texts.
        skip_failed: Keep the texts whose requests failed with their numbers, but without tokens: `failed` of the
            cache. By default, one such record ends the import.
        force: Replace another cache in the folder, once the texts are checked, for which they are read twice. Records
            that can be read only once, such as those of a generator, are checked as they are written.
        progress: Called after each text with (done, total, note): kB of the files, or records.

    Returns:
        The cache.

    Raises:
        UsageError: An option is out of range, or a name is unknown.
        DataError: A file is missing, damaged or of another kind, or a text has something wrong; the message names the
            file, the text and the token. No cache is left.
        CacheMismatch: The folder holds another cache.
        OutputError: The folder cannot be written, or holds something else.
        BackendUnavailable: A table needs pyarrow, which is not installed.
    """
    _check_names(names)
    folder = Path(out)
    check_folder(folder)
    files = _files_of(source)
    options: dict[str, Any] = {
        "names": dict(names or {}),
        "top_k": top_k,
        "tokens": None if tokens is None else sha256_json(tokens),
        **({"skip_failed": True} if skip_failed else {}),
    }
    facts: list[dict[str, Any]] = [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in files or ()
    ]
    if files is None and not force and (folder / MANIFEST).exists():
        raise CacheMismatch(f"{folder} holds a cache, and records in memory cannot be compared with it: pass `force`")
    restart = files is None  # records in memory cannot be compared with those of an unfinished cache either
    reader = RecordReader(names, tokens)
    total = sum(one["bytes"] for one in facts) if files is not None else _length(source)

    def read_into(take: Callable[[Rows], object], done: int = 0) -> int:
        texts = _texts_of_files(files, reader, names or {}) if files is not None else _texts_of_records(source, reader)
        unit = 1 if files is None else 1000
        return _read(islice(texts, done, None), take, top_k, skip_failed, total, progress, unit)

    if force and (folder / MANIFEST).exists() and (files is not None or not isinstance(source, Iterator)):
        check = TextCheck(make_plan(vocabulary, temperature, [], {})["vocabulary"])
        if not read_into(check):
            raise DataError(NO_TEXTS)
    writer = TokenWriter(
        folder, vocabulary, temperature=temperature, options=options, force=force or restart, sources=facts
    )
    try:
        with writer:
            if not writer.is_finished:
                read_into(writer.add_rows, writer.done)
    except DataError:
        delete_tokens(folder)
        raise
    return TokenTeacher.open(folder)


def _read(
    texts: Iterator[Text],
    take: Callable[[Rows], object],
    top_k: int | None,
    skip_failed: bool,
    total: int,
    progress: Progress | None,
    unit: int,
) -> int:
    """Read texts, pass each to `take`, and return the number of those with tokens."""
    count = 0
    for text in texts:
        try:
            rows = _read_text(text, skip_failed)
            if top_k is not None:
                tops = np.full(max(0, len(rows.offsets) - 1), top_k)
                rows = dataclasses.replace(rows, tops=tops if rows.tops is None else np.minimum(rows.tops, tops))
            take(rows)
        except DataError as error:
            raise DataError(f"{text.where}: {error}") from error
        count += not rows.failed
        if progress is not None:
            progress(text.done // unit, max(total, text.done) // unit, "kB" if unit > 1 else "records")
    return count


def _read_text(text: Text, skip_failed: bool) -> Rows:
    try:
        return text.read()
    except FailedRequest as failure:
        if skip_failed:
            return failed_rows(failure.sequence)
        raise


def _files_of(source: Any) -> list[Path] | None:
    """Return the files of a source; None for records."""
    if isinstance(source, (str, os.PathLike)):
        return find_files([Path(source)])
    if isinstance(source, (list, tuple)) and source and all(isinstance(one, (str, os.PathLike)) for one in source):
        return find_files([Path(one) for one in source])
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UsageError(f"`source` is a {type(source).__name__}: pass paths, or records, one per text")
    return None


def _texts_of_files(files: list[Path], reader: RecordReader, names: Mapping[str, str]) -> Iterator[Text]:
    before = 0
    for file in files:
        for text in read_texts(file, reader, names):
            yield text._replace(done=before + text.done)
        before += file.stat().st_size


def _texts_of_records(records: Any, reader: RecordReader) -> Iterator[Text]:
    for index, record in enumerate(records):
        yield Text(f"record {index}", functools.partial(reader.read, record), index + 1)


def _length(records: Any) -> int:
    return len(records) if isinstance(records, Sized) else 0


def _check_names(names: Mapping[str, str] | None) -> None:
    known = (*DEFAULT_NAMES, *_ARRAY_NAMES)
    for name in names or {}:
        if name not in known:
            raise UsageError(f"`names` has {name!r}: pass names of {', '.join(known)}")
