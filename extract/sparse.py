"""Labels of many clips by the numbers of their classes: 527 classes of two million clips are a gigabyte as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import DTypeLike


class SparseLabels:
    """Which of C classes each of N clips has: those of clip n are `numbers[begins[n]:begins[n + 1]]`, ascending.

    begins (N + 1,) int64, numbers (labels of all clips,) int32. Rows are given as (n, C) uint8 where they are indexed,
    and all of them by `np.asarray`. Nothing changes it once it is made, so it is safe between threads.
    """

    def __init__(self, begins: np.ndarray, numbers: np.ndarray, classes: int):
        self.begins, self.numbers, self.classes = begins, numbers, classes
        self.dtype, self.ndim = np.dtype(np.uint8), 2

    @classmethod
    def of(cls, rows: Sequence[Iterable[int]], classes: int) -> SparseLabels:
        """From the numbers of each clip, ascending."""
        counts = np.fromiter((len(tuple(row)) for row in rows), dtype=np.int64, count=len(rows))
        numbers = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(counts.sum()))
        return cls(np.concatenate([[0], np.cumsum(counts)]), numbers, classes)

    @classmethod
    def ordered(cls, counts: np.ndarray, numbers: np.ndarray, classes: int) -> SparseLabels:
        """From how many labels each clip has, (N,), and their numbers in any order; a label given twice counts once."""
        row_of = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        pairs = np.sort(row_of * max(classes, 1) + numbers)
        pairs = pairs[np.diff(pairs, prepend=-1) != 0]
        rows, sorted_numbers = np.divmod(pairs, max(classes, 1))
        begins = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=len(counts)), out=begins[1:])
        return cls(begins, sorted_numbers.astype(np.int32), classes)

    def __len__(self) -> int:
        return len(self.begins) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.classes

    @property
    def counts(self) -> np.ndarray:
        """(N,) int64: how many labels each clip has."""
        return np.diff(self.begins)

    def row(self, row: int) -> tuple[int, ...]:
        """The numbers of one clip's classes."""
        return tuple(self.numbers[self.begins[row] : self.begins[row + 1]].tolist())

    def take(self, rows: np.ndarray) -> SparseLabels:
        """These clips alone, in this order."""
        rows = np.arange(len(self))[rows]
        counts = self.counts[rows]
        begins = np.concatenate([[0], np.cumsum(counts)])
        at = np.arange(begins[-1]) + np.repeat(self.begins[rows] - begins[:-1], counts)
        return SparseLabels(begins, self.numbers[at], self.classes)

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> np.ndarray:
        """(n, C) uint8 of these clips."""
        some = self.take(np.asarray(rows) if isinstance(rows, list) else rows)  # type: ignore[arg-type]
        dense = np.zeros(some.shape, dtype=np.uint8)
        dense[np.repeat(np.arange(len(some)), some.counts), some.numbers] = 1
        return dense

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        dense = self[:]
        return dense if dtype is None else dense.astype(dtype, copy=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseLabels):
            return NotImplemented
        return (
            self.classes == other.classes
            and np.array_equal(self.begins, other.begins)
            and np.array_equal(self.numbers, other.numbers)
        )

    __hash__ = None  # type: ignore[assignment]
