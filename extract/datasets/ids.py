"""Ids of clips that have none: from their files' names, as short as tells them apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from whisper_at_cli.extract.datasets.base import as_text, seconds_suffix, stem_of, without_suffix
from whisper_at_cli.extract.texts import first_repeated, first_rows, mapped, text_column


def clip_ids(
    paths: np.ndarray, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, tuple[int, int] | None]:  # fmt: skip
    """(N,) of text: the stem where all stems differ, else the path without its suffix, else the path.

    Where several clips lie in one file, with the start behind it (and the end where starts repeat). `start`, `end` (N,)
    are in seconds, NaN where there is none. The same part of the same file twice gets the same id twice: then the first
    row with an id that an earlier row has is given too, and this earlier row.
    """
    first = first_rows(paths)
    own = first == np.arange(len(first))
    several = np.flatnonzero(np.bincount(first, minlength=len(first))[first] > 1)
    ids, repeated = paths, None
    for names in _names(paths, own):
        if not len(several):
            return names, None
        for with_end in (False, True):
            ids = names.copy()
            ids[several] = text_column(
                [
                    names[row] + seconds_suffix(_given(start[row]), _given(end[row]), with_end=with_end)
                    for row in several.tolist()
                ]
            )
            repeated = first_repeated(ids)
            if repeated is None:
                return ids, None
    return ids, repeated


def _given(seconds: float) -> float | None:
    return None if np.isnan(seconds) else float(seconds)


def _names(paths: np.ndarray, own: np.ndarray) -> Iterator[np.ndarray]:
    """A name for each path, the shortest first; `own`, (N,) bool, are the rows of which no earlier one has the path."""
    yield _unique_names(paths, own)
    yield mapped(_without_suffixes, paths)
    yield mapped(_texts, paths)


def _unique_names(paths: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The shortest names that differ wherever paths do."""
    for shorten in (_stems, _without_suffixes):
        names = mapped(shorten, paths)
        if first_repeated(names if own.all() else names[own]) is None:
            return names
    return mapped(_texts, paths)


def _stems(paths: np.ndarray) -> list[str]:
    """`stem_of` of each, without a call for each that is plain."""
    return [
        path[begin:dot]
        if (begin := path.rfind("/") + 1) < (dot := path.rfind(".")) < len(path) - 1 and path.isascii()
        else as_text(stem_of(path))
        for path in paths
    ]


def _without_suffixes(paths: np.ndarray) -> list[str]:
    return [as_text(without_suffix(path)) for path in paths]


def _texts(paths: np.ndarray) -> list[str]:
    return list(map(as_text, paths))
