"""Folds as datasets number them, from 1 here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from whisper_at_cli.extract import notes

FOLD_FOLDER = re.compile(r"fold[-_ ]?([0-9]{1,4})", re.IGNORECASE)


def fold_of_folder(name: str) -> int | None:
    """The fold that a folder's name says: `fold_3`, `Fold 3`, `fold03`."""
    match = FOLD_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def from_one(folds: Sequence[int | None]) -> tuple[list[int], list[str]]:
    """Folds counted from 1, 0 for none; and notes.

    Where 0 stands beside 1 to n - 1, folds were counted from 0: nobody's clips are dropped. Any other 0 is none.
    """
    there = {fold for fold in folds if fold is not None}
    last = max(there, default=0)
    if last and there == set(range(last + 1)):
        shifted = [0 if fold is None else fold + 1 for fold in folds]
        return shifted, [notes.FOLDS_FROM_ZERO(last=last, count=last + 1)]
    said = []
    if len(there) > 1 and 0 in there:
        others = ", ".join(str(fold) for fold in sorted(there - {0})[:12])
        said.append(notes.FOLD_ZERO(clips=sum(fold == 0 for fold in folds), folds=others))
    return [fold or 0 for fold in folds], said
