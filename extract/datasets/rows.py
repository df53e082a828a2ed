"""What a manifest says of its clips, as columns: rows are added one by one, or many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from whisper_at_cli.extract.texts import empty_texts, joined, mapped, text_column

ROWS_AT_ONCE = 8192  # that are gathered as objects
NAN_LABEL = ("nan",)  # as pandas writes an empty cell


@dataclass(frozen=True, slots=True)
class Entry:
    """What a manifest says of one clip."""

    place: str
    audio: str
    start: float | None
    end: float | None
    labels: tuple[str, ...]
    fold: int | None
    split: str
    id: str
    text: str


class Part(NamedTuple):
    """Columns of some rows, as in `Rows`. None is a column in which nothing stands."""

    numbers: np.ndarray
    audio: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    start: np.ndarray | None = None
    end: np.ndarray | None = None
    fold: np.ndarray | None = None
    split: np.ndarray | None = None
    id: np.ndarray | None = None
    text: np.ndarray | None = None


@dataclass(frozen=True)
class Rows:
    """The N rows of one or several tables, as columns. Never changed once they are made."""

    tables: tuple[tuple[str, Path], ...]  # what a row is, a `line` or an `entry`, and of which file
    table: np.ndarray  # (N,) int16: which of the tables a row is of
    numbers: np.ndarray  # (N,) int64, of their lines
    audio: np.ndarray  # (N,) text
    start: np.ndarray  # (N,) float64 seconds, NaN for none
    end: np.ndarray  # (N,) float64 seconds, NaN for none
    counts: np.ndarray  # (N,) int64: how many labels each has
    labels: np.ndarray  # (labels of all rows,) int32, numbers of `names` in the order in which they are given
    names: tuple[str, ...]  # every label once, in the order in which they appear
    fold: np.ndarray  # (N,) int32, -1 for none
    split: np.ndarray  # (N,) text, empty for none; as are id and text
    id: np.ndarray
    text: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, row: int) -> str:
        """Where a row stands, for a message: `line 3 of clips.csv`."""
        kind, path = self.tables[self.table[row]]
        return f"{kind} {self.numbers[row]} of {path}"

    def take(self, rows: np.ndarray) -> Rows:
        """These rows, in this order."""
        begins = np.concatenate([[0], np.cumsum(self.counts)])
        counts = self.counts[rows]
        at = np.arange(counts.sum()) + np.repeat(begins[rows] - np.cumsum(counts) + counts, counts)
        columns = {name: getattr(self, name)[rows] for name in PER_ROW}
        return replace(self, **columns, counts=counts, labels=self.labels[at])

    def with_labels(self, new: dict[str, tuple[str, ...]]) -> Rows:
        """The rows with others in the place of each label, of which a row has each once."""
        index: dict[str, int] = {}
        numbers = [[index.setdefault(label, len(index)) for label in new[name]] for name in self.names]
        many, flat = label_columns(numbers)
        begins = np.cumsum(many) - many
        counts = many[self.labels]
        at = np.arange(counts.sum()) + np.repeat(begins[self.labels] - np.cumsum(counts) + counts, counts)
        row_of = np.repeat(np.arange(len(self)), self.counts)
        per_row = np.bincount(row_of, weights=counts, minlength=len(self)).astype(np.int64)
        per_row, labels = each_once(per_row, flat[at])
        return replace(self, counts=per_row, labels=labels, names=tuple(index))

    def with_audio(self, function: Callable[[str], str]) -> Rows:
        return replace(self, audio=mapped(lambda paths: list(map(function, paths)), self.audio))


PER_ROW = ("table", "numbers", "audio", "start", "end", "fold", "split", "id", "text")


@dataclass
class RowsBuilder:
    """Gathers rows of one table.

    `index` numbers the labels; `without` counts the rows whose label is pandas' nan; `lists` says whether the labels of
    any are a list, or might be one as Python writes it; `kind` is what a row is called, a `line` or an `entry`.
    """

    index: dict[str, int] = field(default_factory=dict)
    without: int = 0
    lists: bool = False
    kind: str = "line"
    parts: list[Part] = field(default_factory=list)
    _waiting: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        self._waiting.append(entry)
        if len(self._waiting) >= ROWS_AT_ONCE:
            self._flush()

    def numbers_of(self, labels: tuple[str, ...]) -> tuple[int, ...]:
        """The numbers of a row's labels, which are added to the index; none for pandas' nan, which is counted."""
        if labels == NAN_LABEL:
            self.without += 1
            return ()
        return tuple(self.index.setdefault(name, len(self.index)) for name in labels)

    def _flush(self) -> None:
        if entries := self._waiting:
            self.parts.append(self.part_of(entries))
            self._waiting = []

    def part_of(self, entries: Sequence[Entry]) -> Part:
        """The columns of some entries."""
        labels = [self.numbers_of(entry.labels) for entry in entries]
        self.kind = entries[0].place.split(" ", 1)[0]
        return Part(
            np.array([int(entry.place.split(" ", 2)[1]) for entry in entries], dtype=np.int64),
            text_column([entry.audio for entry in entries]),
            *label_columns(labels),
            seconds_column(entry.start for entry in entries),
            seconds_column(entry.end for entry in entries),
            fold_column([entry.fold for entry in entries]),
            *(text_column([getattr(entry, name) for entry in entries]) for name in ("split", "id", "text")),
        )

    def rows(self, path: Path) -> Rows:
        """All that was added, of the table at `path`. The builder is used up."""
        self._flush()
        lengths = [len(part.numbers) for part in self.parts]
        N, columns = sum(lengths), {name: [getattr(part, name) for part in self.parts] for name in Part._fields}
        self.parts = []  # each column's are let go once they are joined

        def column(name: str, dtype: type, absent: float) -> np.ndarray:
            filled = [
                np.full(length, absent, dtype) if values is None else values
                for values, length in zip(columns.pop(name), lengths, strict=True)
            ]
            return np.concatenate([np.zeros(0, dtype), *filled])

        def texts(name: str) -> np.ndarray:
            there = columns.pop(name)
            if all(values is None for values in there):
                return empty_texts(N)
            return joined(
                [empty_texts(n) if values is None else values for values, n in zip(there, lengths, strict=True)]
            )

        return Rows(
            ((self.kind, path),), np.zeros(N, dtype=np.int16), column("numbers", np.int64, 0), texts("audio"),
            column("start", np.float64, math.nan), column("end", np.float64, math.nan),
            column("counts", np.int64, 0), column("labels", np.int32, 0), tuple(self.index),
            column("fold", np.int32, -1), texts("split"), texts("id"), texts("text"),
        )  # fmt: skip


def joined_rows(tables: Sequence[Rows]) -> Rows:
    """The rows of several tables, one after another."""
    if len(tables) == 1:
        return tables[0]
    index: dict[str, int] = {}
    labels, numbered = [], []
    places: list[tuple[str, Path]] = []
    for rows in tables:
        number = np.array([index.setdefault(name, len(index)) for name in rows.names], dtype=np.int32)
        labels.append(number[rows.labels])
        numbered.append(replace(rows, table=rows.table + len(places)))
        places += rows.tables
    columns = {name: np.concatenate([getattr(rows, name) for rows in numbered]) for name in (*PER_ROW, "counts")}
    return Rows(tuple(places), **columns, labels=np.concatenate(labels), names=tuple(index))


def label_columns(labels: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """How many labels each row has, (N,) int64, and all of them, int32."""
    counts = np.fromiter(map(len, labels), dtype=np.int64, count=len(labels))
    return counts, np.fromiter(chain.from_iterable(labels), dtype=np.int32, count=int(counts.sum()))


def seconds_column(seconds: Iterable[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in seconds], dtype=np.float64)


def fold_column(folds: Sequence[int | None]) -> np.ndarray:
    return np.array([-1 if fold is None else fold for fold in folds], dtype=np.int32)


def each_once(counts: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without -1, and each number once a row, where it stands first."""
    row_of = np.repeat(np.arange(len(counts)), counts)
    pairs = row_of * (int(numbers.max(initial=0)) + 1) + numbers
    kept = numbers >= 0
    if len(np.unique(pairs[kept])) < np.count_nonzero(kept):
        _, first = np.unique(pairs, return_index=True)
        once = np.zeros(len(kept), dtype=bool)
        once[first] = True
        kept &= once
    return np.bincount(row_of[kept], minlength=len(counts)), numbers[kept]
