"""Write a cache of log-probabilities text by text. A killed writer loses at most its current shard."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.errors import CacheMismatch, DataError, UsageError
from kdfast.files import (
    FolderLock,
    atomic_write,
    check_writable,
    make_subfolder,
    read_json,
    schemas,
    sha256_file,
    sha256_json,
    write_json,
    write_sealed,
)
from kdfast.teacher.manifest import BUILDING, MANIFEST, PLAN
from kdfast.teacher.plan import check_same_plan
from kdfast.teacher.tokens.draws import draw_rows
from kdfast.teacher.tokens.layout import (
    MAX_RANK,
    PARTS,
    check_folder,
    delete_tokens,
    dtype_of,
    make_plan,
    part_file,
    read_manifest,
    read_sealed_file,
)
from kdfast.teacher.tokens.sequence import NO_TEXTS, UNKNOWN, Array, Rows, Sequence, TextCheck

_SHARD_BYTES = 64 << 20
_TEXT_BYTES = 1 << 10  # of the objects that hold a text in memory


class TokenWriter:
    """Writes a teacher's log-probabilities, one text after another, for `TokenTeacher`.

    A writer of a folder that holds an unfinished cache of the same settings continues it: `done` texts are stored
    already, which the caller leaves out. Use it in a `with` block. It finishes the cache at the end, unless there is an
    exception.

        with kdfast.TokenWriter("tokens", vocabulary=50257) as writer:
            for text in texts[writer.done:]:
                logp = model(text).logits[0].log_softmax(-1)
                values, ids = logp[:-1].topk(64)
                writer.add(values, ids, labels=text[1:])

    Args:
        out: The folder; created if missing.
        vocabulary: Number of the teacher's tokens.
        temperature: What the logits were divided by before the softmax.
        sampled: The texts are added by `add_samples`: classes drawn at random, not the most probable ones.
        options: Further settings of the caller that determine the content, for JSON; a cache of others is not
            continued.
        force: Delete the cache in the folder first.
        sources: Name, size and digest of the files that the texts come from, for the manifest.

    Attributes:
        done: Number of texts that were stored when the writer was opened.

    Raises:
        CacheMismatch: The folder holds a cache of other settings.
        OutputError: The folder cannot be written, holds something else, or another process writes to it.
        UsageError: The vocabulary or the temperature is out of range.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        vocabulary: int,
        *,
        temperature: float = 1.0,
        sampled: bool = False,
        options: dict[str, Any] | None = None,
        force: bool = False,
        sources: list[dict[str, Any]] | None = None,
    ) -> None:
        plan = make_plan(vocabulary, temperature, sources or [], options or {}, sampled)
        check_folder(Path(out))
        if force:
            delete_tokens(Path(out))
        self.path = check_writable(out)
        self._plan, self._digest = plan, sha256_json(plan)
        self._check = TextCheck(plan["vocabulary"])
        self._lock: FolderLock | None = None
        self._records: list[dict[str, Any]] = []
        self._pending: list[tuple[Sequence, int | None]] = []
        self._pending_bytes = 0
        self.is_finished = (self.path / MANIFEST).exists()
        if self.is_finished:
            manifest = read_manifest(self.path)
            check_same_plan(self.path, _complete(manifest), _complete(plan), "a finished cache")
            self._records = manifest["shards"]
        else:
            self._resume()
        self.done = sum(record["sequences"] for record in self._records)

    def add(
        self,
        values: Any,
        ids: Any,
        *,
        offsets: Any | None = None,
        labels: Any | None = None,
        top_k: int | None = None,
        sequence: int | None = None,
    ) -> None:
        """Store a text of L tokens.

        Args:
            values: (L, k) natural log-probabilities, -inf for entries to leave out; with `offsets`, (E,). An array or a
                tensor.
            ids: (L, k) or (E,) their classes.
            offsets: (L + 1,) first entry of each token.
            labels: (L,) the tokens of the text; -1 or -100 where not known.
            top_k: How many entries of each token are the most probable classes; None: all; 0: not known.
            sequence: Number of the text, for `TokenTeacher.lookup`; pass it for all texts or for none, which numbers
                them from 0 on.

        Raises:
            DataError: Something does not fit; the message names the token.
        """
        given, classes = to_array(values), to_array(ids)
        if offsets is None:
            if given.ndim != 2 or classes.shape != given.shape:
                raise DataError(
                    f"`values` and `ids` have shapes {given.shape} and {classes.shape}: pass both as (L, k), or as "
                    "(E,) with `offsets`"
                )
            bounds: Array = np.arange(len(given) + 1) * given.shape[1]
            given, classes = given.ravel(), classes.ravel()
        else:
            bounds = to_array(offsets)
        tops = None if top_k is None else np.full(len(bounds) - 1, top_k)
        own = None if labels is None else to_array(labels)
        self.add_rows(Rows(given, classes, bounds, own, tops, sequence))

    def add_rows(self, rows: Rows) -> None:
        """Store the rows of a text; `add` makes them.

        Raises:
            DataError: Something does not fit; the message names the token.
        """
        self._check_open(sampled=False)
        self._store(self._check(rows), rows)

    def add_samples(
        self, ids: Any, *, weights: Any | None = None, labels: Any | None = None, sequence: int | None = None
    ) -> None:
        """Store a text of L tokens by classes that were drawn at random, as for `TopKTeacher.from_samples`.

        Args:
            ids: (L, s) drawn classes, repeats included; negative: no draw. Drawn from the teacher's softmax at the
                `temperature`, or from another distribution q.
            weights: (L, s) p / q of each draw, not negative; None: 1.
            labels: As for `add`.
            sequence: As for `add`.

        Raises:
            DataError: Something does not fit; the message names the token.
        """
        self._check_open(sampled=True)
        rows, mean = draw_rows(to_array(ids), None if weights is None else to_array(weights), self._plan["vocabulary"])
        own = None if labels is None else to_array(labels)
        rows = dataclasses.replace(rows, labels=own, sequence=sequence)
        self._store(dataclasses.replace(self._check(rows), tail=mean), rows)

    def _check_open(self, sampled: bool) -> None:
        if self.is_finished:
            raise UsageError(f"{self.path} is finished: write to another folder, or pass `force`")
        if sampled != self._plan.get("sampled", False):
            right = "False: use `add`" if sampled else "True: use `add_samples`"
            raise UsageError(f"`sampled` is {right}")

    def _store(self, text: Sequence, rows: Rows) -> None:
        self._pending.append((text, rows.sequence))
        self._pending_bytes += _TEXT_BYTES + 6 * len(text.ids) + 24 * len(text.counts)
        if self._pending_bytes >= _SHARD_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is left, and the manifest last.

        Raises:
            DataError: There are no texts.
            OutputError: A file cannot be written.
        """
        if self.is_finished:
            return
        if self._pending:
            self._flush()
        if not any(record["tokens"] for record in self._records):
            raise DataError(NO_TEXTS)
        files = {name: facts for record in self._records for name, facts in record["files"].items()}
        shards = [{name: record[name] for name in ("sequences", "tokens", "entries")} for record in self._records]
        labels = any(record["labels"] for record in self._records)
        results = {"shards": shards, "numbered": bool(self._check.is_numbered), "labels": labels, "files": files}
        write_sealed(self.path / MANIFEST, self._plan | results)
        self.close()
        shutil.rmtree(self.path / BUILDING)
        self.is_finished = True

    def close(self) -> None:
        """Release the folder. An unfinished cache stays, for another writer to continue."""
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def _resume(self) -> None:
        """Lock the folder, and find the shards that a killed writer has finished."""
        building = make_subfolder(self.path, BUILDING)
        path = building / PLAN
        if not path.exists():
            write_sealed(path, self._plan)
        found = read_sealed_file(path, schemas.TokenPlan)
        check_same_plan(self.path, _complete(found), _complete(self._plan), "an unfinished cache")
        self._lock = FolderLock(building)
        self._lock.__enter__()
        while (record := self._read_record(len(self._records))) is not None:
            self._records.append(record)
            self._check.is_numbered = record["numbered"]
            if self._check.is_numbered:
                numbers = np.load(self.path / part_file("numbers", len(self._records) - 1))
                self._check.numbers.update(numbers.tolist())

    def _read_record(self, shard: int) -> dict[str, Any] | None:
        """Return the record of a finished shard whose files are as they were written, or None."""
        path = self._record_path(shard)
        if not path.is_file():
            return None
        with contextlib.suppress(DataError, CacheMismatch):
            record: dict[str, Any] = read_json(path, schemas.TokenShardRecord)
            names = {part_file(part, shard) for part in PARTS}
            if record["plan"] == self._digest and record["files"].keys() == names:
                paths = {name: self.path / name for name in names}
                if all(p.is_file() and sha256_file(p) == record["files"][n]["sha256"] for n, p in paths.items()):
                    return record
        return None

    def _record_path(self, shard: int) -> Path:
        return self.path / BUILDING / f"shard-{shard:05d}.json"

    def _flush(self) -> None:
        shard, texts = len(self._records), [text for text, _ in self._pending]
        start = sum(record["sequences"] for record in self._records)
        numbers = [start + i if number is None else number for i, (_, number) in enumerate(self._pending)]
        counts = np.concatenate([text.counts for text in texts])
        labels = np.concatenate([text.labels for text in texts])
        arrays: dict[str, npt.NDArray[Any]] = {
            "values": np.concatenate([text.values for text in texts]),
            "ids": np.concatenate([text.ids for text in texts]),
            "offsets": np.concatenate([[0], np.cumsum(counts)]),
            "ranks": np.concatenate([text.ranks for text in texts]).clip(max=MAX_RANK),
            "tail": np.concatenate([text.tail for text in texts]),
            "labels": labels,
            "lengths": np.array([len(text.counts) for text in texts]),
            "numbers": np.array(numbers),
        }
        files = {}
        for part in PARTS:
            name = part_file(part, shard)
            with atomic_write(self.path / name) as file:
                np.save(file, arrays[part].astype(dtype_of(part, self._plan["vocabulary"])))
            files[name] = {
                "bytes": (self.path / name).stat().st_size,
                "sha256": sha256_file(self.path / name),
            }
        record = {
            "plan": self._digest,
            "files": files,
            "sequences": len(texts),
            "tokens": len(counts),
            "entries": int(counts.sum()),
            "numbered": bool(self._check.is_numbered),
            "labels": bool((labels != UNKNOWN).any()),
        }
        write_json(self._record_path(shard), record)
        self._records.append(record)
        self._pending, self._pending_bytes = [], 0


def _complete(plan: dict[str, Any]) -> dict[str, Any]:
    """Return a plan with the settings that plans have only where they are True."""
    return {"sampled": False, **plan, "options": {"skip_failed": False, **plan["options"]}}


def to_array(values: Any) -> Array:
    """Return an array of an array, a tensor or nested lists; bfloat16 becomes float32."""
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        return np.asarray((tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy())
    return np.asarray(values)
