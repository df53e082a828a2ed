"""The clips of a dataset as columns: two million of them in 300 MB, where as many objects take two gigabytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from whisper_at_cli.extract.sparse import SparseLabels
from whisper_at_cli.extract.texts import empty_texts, text_column


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of a dataset."""

    id: str  # unique
    path: str  # relative to the dataset's root, or absolute
    labels: tuple[int, ...] = ()  # indices into the dataset's class names
    fold: int = 0  # official fold from 1, 0 where there is none
    split: str = ""  # train, valid, test, eval, or empty
    start: float | None = None  # seconds into the file; None is its beginning
    end: float | None = None  # None is the clip's length after the start, or the file's end


class Clips(Sequence[Clip]):
    """A sequence of clips, held as columns; each `Clip` is made when it is asked for. Never changed once it is made.

    ids, split    (N,) text whose memory is its content
    paths         (N,) the same; Python strings where a file's name is not text
    labels        SparseLabels, (N, C) where it is asked for
    fold          (N,) int32, from 1; 0 where there is none
    start, end    (N,) float64 seconds, NaN where there is none; None where no clip has one
    """

    def __init__(
        self, ids: np.ndarray, paths: np.ndarray, labels: SparseLabels, fold: np.ndarray | None = None,
        split: np.ndarray | None = None, start: np.ndarray | None = None, end: np.ndarray | None = None,
    ):  # fmt: skip
        self.ids, self.paths, self.labels = ids, paths, labels
        self.fold = np.zeros(len(ids), dtype=np.int32) if fold is None else fold
        self.split = empty_texts(len(ids)) if split is None else split
        self.start, self.end = _seconds(start), _seconds(end)

    @classmethod
    def of(cls, clips: Iterable[Clip], classes: int) -> Clips:
        """Columns from clips whose labels count up to `classes`."""
        clips = clips if isinstance(clips, Sequence) else list(clips)
        return cls(
            text_column([clip.id for clip in clips]), path_column([clip.path for clip in clips]),
            SparseLabels.of([clip.labels for clip in clips], classes),
            np.array([clip.fold for clip in clips], dtype=np.int32), text_column([clip.split for clip in clips]),
            np.array([math.nan if clip.start is None else clip.start for clip in clips], dtype=np.float64),
            np.array([math.nan if clip.end is None else clip.end for clip in clips], dtype=np.float64),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, row: int) -> Clip: ...

    @overload
    def __getitem__(self, row: slice) -> Clips: ...

    def __getitem__(self, row: int | slice) -> Clip | Clips:
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} clips")
        row = row % len(self)
        return Clip(
            self.ids[row], self.paths[row], self.labels.row(row), int(self.fold[row]), self.split[row],
            _second(self.start, row), _second(self.end, row),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Clip]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: np.ndarray) -> Clips:
        """These clips alone, in this order."""
        start, end = (None if column is None else column[rows] for column in (self.start, self.end))
        return Clips(
            self.ids[rows], self.paths[rows], self.labels.take(rows), self.fold[rows], self.split[rows], start, end
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Clips({len(self)}: {self[0]}, ...)" if len(self) else "Clips(0)"


def path_column(paths: list[str]) -> np.ndarray:
    """(N,) of text, or of Python strings where a file's name holds bytes that are not text."""
    try:
        return text_column(paths)
    except UnicodeEncodeError:
        return np.array(paths, dtype=object)


def _seconds(column: np.ndarray | None) -> np.ndarray | None:
    return None if column is None or np.isnan(column).all() else column


def _second(column: np.ndarray | None, row: int) -> float | None:
    return None if column is None or math.isnan(column[row]) else float(column[row])
