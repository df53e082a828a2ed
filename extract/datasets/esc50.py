"""ESC-50 and whatever shares its layout: audio/FILE and meta/esc50.csv (filename, fold, target, category, ...).

The table may also lie at the top, as Kaggle packs it, and the audio anywhere below: files are found by their names.
"""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.cells import as_fold, as_name, as_whole, from_one
from whisper_at_cli.extract.datasets.base import Clip, Dataset, unique_ids
from whisper_at_cli.extract.datasets.classes import numbered_classes
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.datasets.scan import first_file
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import Table

TABLE = "esc50.csv"
NAMES = (TABLE, "ESC50.csv", "ESC-50.csv", "esc-50.csv")
FOLDERS = ("meta", "metadata")
PLACES = tuple(f"{folder}{name}" for name in NAMES for folder in ("meta/", "", "metadata/"))
LAYOUT = "meta/esc50.csv (filename, fold, target, category) beside audio/"
COLUMNS = ("filename", "fold", "target", "category")


def recognise(path: Path) -> bool:
    return _table_of(path) is not None


def read(path: Path) -> Dataset:
    """All clips of the CSV, in its order, whether or not the files are there. Classes are ordered by target number."""
    file = _table_of(path)
    if file is None:
        raise UsageError(f"{path / PLACES[0]} does not exist; an ESC-50 layout has {LAYOUT}")
    root = path if path.is_dir() else path.parent.parent if path.parent.name in FOLDERS else path.parent
    table = Table(file)
    table.need(*COLUMNS)
    files, folds, targets = [], [], []
    for place, row in table.rows():
        fold = as_fold(row["fold"], place)
        if fold is None:
            raise UsageError(f"{place}: fold is empty; give a whole number from 1")
        files.append(f"audio/{_name(row['filename'], place)}")
        folds.append(fold)
        targets.append((place, as_whole(row["target"], "target", place), row["category"]))
    labels, names = numbered_classes(targets, "target")
    paths, moved = located(root, files, published=True)
    folds, renumbered = from_one(folds)
    clips = tuple(
        Clip(id=name, path=path, labels=(label,), fold=fold)
        for name, path, label, fold in zip(unique_ids(paths), paths, labels, folds, strict=True)
    )
    return Dataset("esc50", root, clips, names, clip_seconds=5.0, notes=(*table.notes, *moved, *renumbered))


def _name(text: str, place: str) -> str:
    name = as_name(text, "filename", place)
    if not name:
        raise UsageError(f"{place} names no file")
    return name


def _table_of(path: Path) -> Path | None:
    if path.is_dir():
        return first_file(path, *PLACES)
    return path if path.name in NAMES and path.is_file() else None
