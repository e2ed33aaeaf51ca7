"""Read a cache of log-probabilities: the teacher's rows of a batch of texts, by their numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.errors import CacheMismatch, ShapeError, UsageError
from kdfast.files.arrays import read_npy
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.ops.kd_loss.offline import pad_rows, rank_bound, tempered_tail
from kdfast.ops.kd_loss.validation import as_float, check_temperature
from kdfast.teacher.checks import check_intact
from kdfast.teacher.tokens.layout import dtype_of, part_file, read_manifest
from kdfast.teacher.tokens.sequence import UNKNOWN, Array, Ints

IGNORE = -100
"""Label of padding, the default of `kdfast.kd_loss`."""


class TokenBatch(NamedTuple):
    """A teacher of a batch of B texts, up to L tokens long, as `kdfast.kd_loss` takes it.

        loss = kdfast.kd_loss(logits.flatten(0, 1), batch.labels.flatten(), batch.teacher, batch.rows.flatten(), ...)

    Row i of a text is the teacher's prediction of its token i, so ``logits`` must be the student's predictions of the
    same tokens: its logits shifted by one.

    Attributes:
        teacher: The teacher's rows of all tokens, one after another, without padding.
        rows: (B, L) int64 row of each token; 0 for padding.
        labels: (B, L) int64 tokens; -100 for padding, for tokens without a prediction, and where not known.
        mask: (B, L) bool: there is a prediction.
        weights: (B, L) float32 mean p / q of the draws of each token, 0 without a prediction, for `weights` of the
            loss; None if the classes were not drawn.
    """

    teacher: TopKTeacher
    rows: Tensor
    labels: Tensor
    mask: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return the batch on a device."""
        teacher = TopKTeacher(*(part.to(device) for part in self.teacher))
        weights = None if self.weights is None else self.weights.to(device)
        return TokenBatch(teacher, self.rows.to(device), self.labels.to(device), self.mask.to(device), weights)


class TokenRows(NamedTuple):
    """The stored rows of some tokens, one after another.

    Attributes:
        values: float32 (M, k) log-probabilities, -inf where a token has fewer entries.
        ids: int64 (M, k) classes.
        tail: float64 (M,) log-mass of the classes left out; of drawn classes, log of the mean weight.
        ranks: int64 (M,) how many entries, from the first on, are the most probable classes.
        labels: int64 (M,) the tokens, -1 where not known.
    """

    values: Tensor
    ids: Tensor
    tail: Tensor
    ranks: Tensor
    labels: Tensor


class TokenTeacher:
    """An opened cache of log-probabilities. Make one with `TokenTeacher.open`.

    Attributes:
        path: The folder.
        manifest: Its manifest.
        vocabulary: Number of the teacher's tokens.
        temperature: What the logits were divided by before the softmax.
        numbers: int64 (S,) number of each text, in the order in which they were written.
        lengths: int64 (S,) tokens of each text.
        has_labels: Whether the tokens of a text are known.
        sampled: Whether the classes were drawn at random.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.vocabulary: int = manifest["vocabulary"]
        self.temperature: float = manifest["temperature"]
        self.has_labels: bool = manifest["labels"]
        self.sampled: bool = manifest.get("sampled", False)
        self._maps: dict[tuple[str, int], Array] = {}
        shards = range(len(manifest["shards"]))
        self.numbers: Ints = np.concatenate([self._load("numbers", shard) for shard in shards])
        self.lengths: Ints = np.concatenate([self._load("lengths", shard) for shard in shards])
        sizes = [shard["sequences"] for shard in manifest["shards"]]
        self._shard: Ints = np.repeat(np.arange(len(sizes)), sizes)
        ends = [np.cumsum(part) for part in np.split(self.lengths, np.cumsum(sizes)[:-1])]
        self._ends: Ints = np.concatenate(ends)  # within the shard
        self._order: Ints = np.argsort(self.numbers, kind="stable")

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check_files: bool = True) -> TokenTeacher:
        """Open a cache, and check that it is intact.

        Args:
            path: The folder.
            check_files: Compare the SHA-256 of every file.

        Raises:
            CacheMismatch: The cache is unfinished or damaged.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if check_files:
            check_intact(folder, manifest["files"])
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped files, which another process maps again."""
        return {**self.__dict__, "_maps": {}}

    @property
    def failed(self) -> Ints:
        """Numbers of the texts whose requests failed, which have no tokens and cannot be looked up."""
        found: Ints = self.numbers[self.lengths == 0]
        return found

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return int(self.lengths.sum())

    def lookup(self, numbers: Any, temperature: float | None = None, *, tail: bool = True) -> TokenBatch:
        """Return the teacher of a batch of texts.

        Args:
            numbers: (B,) numbers of the texts, integers.
            temperature: The T of the loss; None: that of the log-probabilities. At any other one, the mass of the
                classes left out is estimated, see `TopKTeacher.from_logprobs`.
            tail: False: leave out the mass of the other classes, which is biased, see there.

        Returns:
            The batch, on the CPU.

        Raises:
            CacheMismatch: The cache lacks a text, or is damaged.
            ShapeError: The numbers are no integers (B,), or the temperature is out of range.
            UsageError: The classes were drawn at another temperature.
        """
        divisor = self.temperature if temperature is None else as_float("temperature", temperature)
        check_temperature(divisor)
        if self.sampled and divisor != self.temperature:
            raise UsageError(
                f"`temperature` is {divisor:g}, and the classes were drawn at {self.temperature:g}, where alone they "
                "stand for the teacher: pass that, or draw again"
            )
        at = self._find(numbers)
        lengths = torch.from_numpy(self.lengths[at])
        rows = self._read([(int(self._shard[i]), int(self._ends[i] - self.lengths[i]), int(self._ends[i])) for i in at])
        column = torch.arange(int(lengths.max()) if len(lengths) else 0)
        inside = column < lengths.unsqueeze(1)
        row = torch.where(inside, (lengths.cumsum(0) - lengths).unsqueeze(1) + column, 0)
        known = ~torch.isneginf(rows.values).all(1)
        mask = inside & known[row] if len(known) else inside
        labels = torch.where(mask, rows.labels[row], IGNORE) if len(known) else row
        labels = torch.where(labels == UNKNOWN, IGNORE, labels)
        weights = None
        if self.sampled:
            weights = torch.where(mask, rows.tail[row].exp().float(), 0) if len(known) else mask.float()
        return TokenBatch(self._teacher(rows, divisor, tail and not self.sampled), row, labels, mask, weights)

    def blocks(self, tokens: int = 1 << 14) -> Iterator[TokenRows]:
        """Yield the stored rows of all texts, in the order in which they were written, about ``tokens`` at a time."""
        for shard, facts in enumerate(self.manifest["shards"]):
            for begin in range(0, facts["tokens"], tokens):
                yield self._read([(shard, begin, min(begin + tokens, facts["tokens"]))])

    def _teacher(self, rows: TokenRows, divisor: float, tail: bool) -> TopKTeacher:
        found = ~torch.isneginf(rows.values).all(1)
        rest = torch.where(found, -torch.inf, 0.0).double()
        if tail and divisor == self.temperature:
            rest = rows.tail
        elif tail:
            most, rank = rank_bound(rows.values, rows.ranks)
            others = self.vocabulary - torch.isneginf(rows.values).logical_not().sum(1)
            rest = tempered_tail(rows.tail, most, rank, others, self.temperature / divisor).estimate
        values = rows.values if self.temperature == 1 else rows.values * self.temperature
        return TopKTeacher(values, rows.ids.to(torch.int32), rest.float())

    def _find(self, numbers: Any) -> Ints:
        """Return the positions of texts."""
        wanted = np.asarray(numbers)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise ShapeError(f"`numbers` are {wanted.dtype} of shape {wanted.shape}: pass integers (B,), one per text")
        wanted = wanted.astype(np.int64)
        place = np.searchsorted(self.numbers, wanted, sorter=self._order).clip(max=len(self) - 1)
        at: Ints = self._order[place]
        missing = wanted[self.numbers[at] != wanted]
        if len(missing):
            raise CacheMismatch(
                f"{self.path} lacks {len(missing)} of the texts (for example {missing[0]}); it holds {len(self)}: look "
                "up texts by the numbers with which they were written"
            )
        empty = wanted[self.lengths[at] == 0]
        if len(empty):
            raise CacheMismatch(
                f"{self.path} has no tokens of {len(empty)} of the texts (for example {empty[0]}), whose requests "
                "failed: leave out the texts whose numbers are in `failed` of the cache"
            )
        return at

    def _read(self, pieces: list[tuple[int, int, int]]) -> TokenRows:
        """Return the rows of tokens from `begin` up to `end` of shards."""
        parts: dict[str, list[Array]] = {name: [] for name in ("values", "ids", "tail", "ranks", "labels", "counts")}
        for shard, begin, end in pieces:
            offsets = self._load("offsets", shard)[begin : end + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            parts["counts"].append(np.diff(offsets))
            for name in ("values", "ids"):
                parts[name].append(self._load(name, shard)[first:last])
            for name in ("tail", "ranks", "labels"):
                parts[name].append(self._load(name, shard)[begin:end])
        joined = {name: np.concatenate(found) if found else np.zeros(0, np.int64) for name, found in parts.items()}
        bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(joined["counts"])]))
        values, ids = pad_rows(_tensor(joined["values"], np.float32), _tensor(joined["ids"], np.int64), bounds)
        ranks, labels = _tensor(joined["ranks"], np.int64), _tensor(joined["labels"], np.int64)
        return TokenRows(values, ids, _tensor(joined["tail"], np.float64), ranks, labels)

    def _load(self, part: str, shard: int) -> npt.NDArray[Any]:
        """Return an array of a shard, mapped into memory."""
        key = (part, shard)
        if key not in self._maps:
            facts = self.manifest["shards"][shard]
            sizes = {"values": facts["entries"], "ids": facts["entries"], "offsets": facts["tokens"] + 1}
            size = sizes.get(part, facts["sequences" if part in ("lengths", "numbers") else "tokens"])
            self._maps[key] = read_npy(
                self.path / part_file(part, shard),
                shape=(size,),
                dtype=dtype_of(part, self.vocabulary),
                mmap_mode="r",
                error=CacheMismatch,
                advice="write the cache again",
            )
        return self._maps[key]


def _tensor(array: Array, dtype: npt.DTypeLike) -> Tensor:
    return torch.from_numpy(array.astype(dtype))
