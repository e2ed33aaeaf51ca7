"""Texts of files: logs of inference servers (.jsonl), arrays (.npz, .safetensors), tables of Hugging Face Datasets."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdfast.errors import BackendUnavailable, DataError
from kdfast.files.arrays import read_npz
from kdfast.files.inputs import MAX_JSON_BYTES, open_regular
from kdfast.teacher.tokens.records import DEFAULT_NAMES, RecordReader
from kdfast.teacher.tokens.sequence import Array, Rows

_LINES = (".jsonl", ".ndjson")
_TABLES = (".parquet", ".arrow")
_INSTALL = "reading Parquet and Arrow files needs pyarrow: run pip install pyarrow"
KINDS = "*.jsonl, *.jsonl.gz, *.npz, *.safetensors, *.parquet, *.arrow, or a folder of them"


class Text(NamedTuple):
    """A text of a source; texts that are stored already are not read.

    Attributes:
        where: Where it is, for messages.
        read: Reads it.
        done: Bytes of the file up to its end, or records; 0 if not known.
    """

    where: str
    read: Callable[[], Rows]
    done: int


def find_files(paths: list[Path]) -> list[Path]:
    """Return the files of the paths, where a folder stands for the files in it, sorted by name.

    Raises:
        DataError: A file is missing or of another kind, or a folder has none.
    """
    files = []
    for path in paths:
        found = sorted(file for file in path.iterdir() if _is_known(file)) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path} has no file of log-probabilities: pass {KINDS}")
        for file in found:
            if not file.is_file():
                raise DataError(f"there is no file {file}: check the path")
            if not _is_known(file):
                raise DataError(f"{file} is of no known kind: pass {KINDS}")
        files += found
    return files


def read_texts(file: Path, reader: RecordReader, names: Mapping[str, str]) -> Iterator[Text]:
    """Yield the texts of a file, in order.

    Raises:
        DataError: The file is damaged, or has other arrays.
        BackendUnavailable: The file needs pyarrow, which is not installed.
    """
    name = file.name.lower()
    if name.endswith((".npz", ".safetensors")):
        yield from _array_texts(file, DEFAULT_NAMES | dict(names))
    elif name.endswith(_TABLES):
        for row, record in enumerate(_table_rows(file)):
            yield Text(f"{file}, row {row}", functools.partial(reader.read, record), 0)
    else:
        for number, (line, done) in enumerate(_lines(file), 1):
            if line.strip():
                yield Text(f"{file}, line {number}", functools.partial(_read_line, reader, line), done)


def _is_known(file: Path) -> bool:
    name = file.name.lower().removesuffix(".gz")
    whole = file.name.lower().endswith((".npz", ".safetensors", *_TABLES))
    return whole or name.endswith(_LINES)


def _lines(file: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of a file, and the bytes read up to their ends."""
    try:
        with open_regular(file) as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if file.suffix.lower() == ".gz" else raw
            while line := stream.readline(MAX_JSON_BYTES + 1):
                if len(line) > MAX_JSON_BYTES:
                    raise DataError(f"{file} has a line of more than {MAX_JSON_BYTES} bytes: write one text per line")
                yield line, raw.tell()
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _read_line(reader: RecordReader, line: bytes) -> Rows:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not valid JSON ({error})") from error
    return reader.read(record)


def _table_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet or Arrow file as dicts; one batch is in memory at a time."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise BackendUnavailable(_INSTALL) from error
    try:
        if file.suffix.lower() == ".parquet":
            with pq.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=64):
                    yield from batch.to_pylist()
            return
        with pa.memory_map(str(file)) as source:
            try:
                batches: Any = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                found = pa.ipc.open_file(source)
                batches = (found.get_batch(i) for i in range(found.num_record_batches))
            for batch in batches:
                for begin in range(0, batch.num_rows, 64):
                    yield from batch.slice(begin, 64).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is damaged or of another kind ({error}): write it again") from error


def _array_texts(file: Path, names: Mapping[str, str]) -> Iterator[Text]:
    arrays = read_npz(file) if file.suffix.lower() == ".npz" else _read_safetensors(file)
    missing = [names[part] for part in ("values", "ids") if names[part] not in arrays]
    if missing:
        raise DataError(f"{file} lacks {', '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
    try:
        texts = list(_split(arrays, names))
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(f"{file}: {error}") from error
    for index, rows in enumerate(texts):
        yield Text(f"{file}, text {index}", functools.partial(_same, rows), file.stat().st_size)


def _same(rows: Rows) -> Rows:
    return rows


def _read_safetensors(file: Path) -> dict[str, Array]:
    from safetensors import safe_open  # optional format, imported on use

    from kdfast.teacher.tokens.write import to_array

    try:
        with safe_open(str(file), "pt") as opened:
            return {name: to_array(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 - no dict
    except Exception as error:  # a damaged file can fail in any part of its reader
        raise DataError(f"{file} is damaged or of another kind ({error}): write it again") from error


def _split(arrays: Mapping[str, Array], names: Mapping[str, str]) -> Iterator[Rows]:
    """Yield the texts of arrays: values (S, L, k); (N, k) with lengths (S,); or (E,) with offsets (N + 1,) as well."""
    values: Any = arrays[names["values"]]
    ids: Any = arrays[names["ids"]]
    labels, numbers, lengths = (arrays.get(names.get(part, part)) for part in ("labels", "sequence", "lengths"))
    offsets = arrays.get(names.get("offsets", "offsets"))
    if ids.shape != values.shape:
        raise ValueError(
            f"{names['values']} have shape {values.shape} and {names['ids']} {ids.shape}: must be the same"
        )
    if values.ndim not in (2, 3) and not (values.ndim == 1 and offsets is not None):
        raise ValueError(
            f"{names['values']} have shape {values.shape}: must be (S, L, k), (N, k) with lengths (S,), or (E,) with "
            "offsets (N + 1,) and lengths (S,)"
        )
    padded = values.shape[:2] if values.ndim == 3 else None
    if padded is not None:
        values, ids = values.reshape(-1, values.shape[2]), ids.reshape(-1, values.shape[2])
        labels = None if labels is None else labels.reshape(-1)
    bounds: Any = offsets if values.ndim == 1 else np.arange(len(values) + 1) * values.shape[1]
    total = len(bounds) - 1
    if padded is not None:
        lengths = np.full(padded[0], padded[1]) if lengths is None else lengths
        _check_lengths(lengths, padded[0], padded[1])
        starts: Array = np.arange(padded[0]) * padded[1]
    else:
        lengths = np.array([total]) if lengths is None else lengths
        _check_lengths(lengths, len(lengths), total)
        if int(lengths.sum()) != total:
            raise ValueError(f"lengths sum to {int(lengths.sum())}, and there are {total} tokens")
        starts = np.cumsum(lengths) - lengths
    values, ids, bounds = values.reshape(-1), ids.reshape(-1), bounds.astype(np.int64)
    for text, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        inside = bounds[start : start + length + 1]
        first, last = int(inside[0]), int(inside[-1])
        own = None if labels is None else labels[start : start + length]
        number = None if numbers is None else int(numbers[text])
        yield Rows(values[first:last], ids[first:last], inside - first, own, None, number)


def _check_lengths(lengths: Array, texts: int, longest: int) -> None:
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or len(lengths) != texts:
        raise ValueError(f"lengths are {lengths.dtype} of shape {lengths.shape}: must be integers ({texts},)")
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= longest:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}: must be 1 to {longest}")
