"""UrbanSound8K: metadata/UrbanSound8K.csv and audio/fold1 to audio/fold10, or both at the top, as Kaggle packs it."""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.cells import as_fold, as_name, as_whole, from_one
from whisper_at_cli.extract.datasets.base import Clip, Dataset, unique_ids
from whisper_at_cli.extract.datasets.classes import numbered_classes
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.datasets.scan import first_file
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import Table

TABLE = "UrbanSound8K.csv"
NAMES = (TABLE, "UrbanSound8k.csv", "urbansound8k.csv", "urbansound8K.csv")
FOLDERS = ("metadata", "meta")
PLACES = tuple(f"{folder}{name}" for name in NAMES for folder in ("metadata/", "", "meta/"))
LAYOUT = f"{PLACES[0]} (slice_file_name, fold, classID, class) beside audio/fold1 to audio/fold10"
COLUMNS = ("slice_file_name", "fold", "classID", "class")


def recognise(path: Path) -> bool:
    return _table_of(path) is not None


def read(path: Path) -> Dataset:
    """All clips of the table, in its order. Its start and end say where a slice came from, not where it lies."""
    file = _table_of(path)
    if file is None:
        raise UsageError(f"{path / PLACES[0]} does not exist; UrbanSound8K's layout is {LAYOUT}")
    root = path if path.is_dir() else path.parent.parent if path.parent.name in FOLDERS else path.parent
    table = Table(file)
    table.need(*COLUMNS)
    files, folds, numbers = [], [], []
    for place, row in table.rows():
        fold = as_fold(row["fold"], place)
        if fold is None:
            raise UsageError(f"{place}: fold is empty; give a whole number from 1")
        folds.append(fold)
        files.append(f"audio/fold{fold}/{as_name(row['slice_file_name'], 'slice_file_name', place)}")
        numbers.append((place, as_whole(row["classid"], "classID", place), row["class"]))
    labels, names = numbered_classes(numbers, "classID")
    paths, moved = located(root, files, published=True)
    folds, renumbered = from_one(folds)
    clips = tuple(
        Clip(name, path, (label,), fold)
        for name, path, label, fold in zip(unique_ids(paths), paths, labels, folds, strict=True)
    )
    return Dataset("urbansound8k", root, clips, names, clip_seconds=4.0, notes=(*table.notes, *moved, *renumbered))


def _table_of(path: Path) -> Path | None:
    if path.is_dir():
        return first_file(path, *PLACES)
    return path if path.name in NAMES and path.is_file() else None
