"""Columns of text whose memory is their content: arrays of NumPy's variable-width strings, (N,) of `TEXT`.

A fixed-width array gives every text the room of the longest, so that one long path among 500,000 rows takes
gigabytes; a list of Python strings adds 50 bytes to each. Entries of these arrays are Python's `str`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import overload

import numpy as np

TEXT = np.dtypes.StringDType()
ROWS_AT_ONCE = 1 << 16  # that are Python strings at a time


def text_column(texts: Iterable[str] | np.ndarray) -> np.ndarray:
    """(N,) of TEXT. Raises UnicodeEncodeError for what is not text, such as half a surrogate pair."""
    if isinstance(texts, np.ndarray):
        return texts if texts.dtype == TEXT else texts.astype(TEXT)
    return np.array(texts if isinstance(texts, list) else list(texts), dtype=TEXT)


def empty_texts(count: int) -> np.ndarray:
    """(N,) of TEXT, all empty."""
    return np.full(count, "", dtype=TEXT)


def mapped(function: Callable[[np.ndarray], list[str]], column: np.ndarray) -> np.ndarray:
    """(N,) of TEXT: what a function makes of parts of a column, a text for each."""
    out = np.empty(len(column), dtype=TEXT)
    for begin in range(0, len(column), ROWS_AT_ONCE):
        out[begin : begin + ROWS_AT_ONCE] = text_column(function(column[begin : begin + ROWS_AT_ONCE]))
    return out


def as_objects(column: Iterable[str]) -> np.ndarray:
    """(N,) of Python strings, of which equal ones are one: for columns with few different texts."""
    known: dict[str, str] = {}
    return np.array([known.setdefault(text, text) for text in column], dtype=object)


def joined(columns: list[np.ndarray]) -> np.ndarray:
    """Columns of text one after another; no columns are an empty one."""
    return np.concatenate(columns) if len(columns) > 1 else columns[0] if columns else empty_texts(0)


def first_rows(column: np.ndarray) -> np.ndarray:
    """(N,) int64: for each row the first row that holds the same text, which is the row itself where it is new.

    Texts are told apart by their hashes, and those that seem equal are compared: no set of all texts is made.
    """
    hashes = np.fromiter(map(hash, column), dtype=np.int64, count=len(column))
    order = np.argsort(hashes, kind="stable")
    begins = np.flatnonzero(np.diff(hashes[order], prepend=hashes[order[:1]] - 1)) if len(order) else order
    first = np.empty(len(column), dtype=np.int64)
    first[order] = np.repeat(order[begins], np.diff(begins, append=len(order)))
    again = np.flatnonzero(first != np.arange(len(first)))
    if len(again) and not (column[again] == column[first[again]]).all():  # different texts with one hash
        seen: dict[str, int] = {}
        return np.fromiter((seen.setdefault(text, row) for row, text in enumerate(column)), np.int64, len(column))
    return first


def first_repeated(column: np.ndarray) -> tuple[int, int] | None:
    """The first row whose text an earlier row has, and this earlier row; None where all texts differ."""
    first = first_rows(column)
    again = np.flatnonzero(first != np.arange(len(first)))
    return (int(again[0]), int(first[again[0]])) if len(again) else None


class TextColumn(Sequence[str]):
    """A column of text as a sequence: as good as a tuple of strings, in less memory."""

    def __init__(self, column: np.ndarray):
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> TextColumn: ...

    def __getitem__(self, row: int | slice) -> str | TextColumn:
        return TextColumn(self.column[row]) if isinstance(row, slice) else str(self.column[row])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
