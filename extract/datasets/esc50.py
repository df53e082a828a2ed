"""ESC-50 and whatever shares its layout: audio/FILE and meta/esc50.csv (filename, fold, target, category, ...)."""

from __future__ import annotations

import csv
from pathlib import Path

from whisper_at_cli.extract.datasets.base import Clip, Dataset, unique_ids
from whisper_at_cli.extract.errors import UsageError

LAYOUT = "meta/esc50.csv (filename, fold, target, category) beside audio/"
COLUMNS = ("filename", "fold", "target", "category")


def recognise(root: Path) -> bool:
    return (root / "meta" / "esc50.csv").is_file()


def read(root: Path) -> Dataset:
    """All clips of the CSV, in its order, whether or not the files are there. Classes are ordered by target number."""
    path = root / "meta" / "esc50.csv"
    if not path.is_file():
        raise UsageError(f"{path} does not exist; an ESC-50 layout has {LAYOUT}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UsageError(f"{path} lacks the column {missing[0]!r}; it has {reader.fieldnames}")
            rows = [(reader.line_num, [row[column] for column in COLUMNS]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a readable CSV file: {error}") from error
    targets: dict[int, str] = {}
    entries = []
    for line, (filename, fold, target, category) in rows:
        try:
            entries.append((filename, int(fold), int(target)))
        except (TypeError, ValueError) as error:
            raise UsageError(f"line {line} of {path}: fold and target must be whole numbers ({error})") from error
        if targets.setdefault(int(target), category) != category:
            raise UsageError(
                f"line {line} of {path}: target {target} is {category!r} here and {targets[int(target)]!r} above"
            )
    order = sorted(targets)
    index = {target: at for at, target in enumerate(order)}
    paths = [f"audio/{filename}" for filename, _, _ in entries]
    clips = tuple(
        Clip(id=name, path=path, labels=(index[target],), fold=fold)
        for name, path, (_, fold, target) in zip(unique_ids(paths), paths, entries, strict=True)
    )
    return Dataset("esc50", root, clips, tuple(targets[target] for target in order), clip_seconds=5.0)
