"""UrbanSound8K as published: metadata/UrbanSound8K.csv and audio/fold1 to audio/fold10."""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.datasets import tables
from whisper_at_cli.extract.datasets.base import Clip, Dataset, unique_ids
from whisper_at_cli.extract.errors import UsageError

TABLE = "metadata/UrbanSound8K.csv"
LAYOUT = f"{TABLE} (slice_file_name, fold, classID, class) beside audio/fold1 to audio/fold10"
COLUMNS = ("slice_file_name", "fold", "classID", "class")


def recognise(path: Path) -> bool:
    return (path / TABLE).is_file()


def read(path: Path) -> Dataset:
    """All clips of the table, in its order. Its start and end say where a slice came from, not where it lies."""
    table = path / TABLE
    if not table.is_file():
        raise UsageError(f"{table} does not exist; UrbanSound8K's layout is {LAYOUT}")
    files, folds, numbers = [], [], []
    names: dict[int, str] = {}
    for place, row in tables.csv_rows(table, needs=COLUMNS):
        fold = tables.as_fold(row["fold"], place)
        number = row["classID"]
        if not (number.isascii() and number.isdecimal() and len(number) < 8):
            raise UsageError(f"{place}: classID is {number!r}; give a whole number from 0")
        if names.setdefault(int(number), row["class"]) != row["class"]:
            raise UsageError(f"{place}: classID {number} is {row['class']!r} here and {names[int(number)]!r} above")
        files.append(f"audio/fold{fold}/{tables.as_name(row['slice_file_name'], 'slice_file_name', place)}")
        folds.append(fold)
        numbers.append(int(number))
    at = {number: index for index, number in enumerate(sorted(names))}
    clips = tuple(
        Clip(name, file, (at[number],), fold)
        for name, file, number, fold in zip(unique_ids(files), files, numbers, folds, strict=True)
    )
    return Dataset("urbansound8k", path, clips, tuple(names[number] for number in sorted(names)), clip_seconds=4.0)
