"""A folder that Hugging Face `datasets` wrote with `save_to_disk`; needs that library (extra `hf`)."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_at_cli.extract.audio.sources import TableClip, arrow_rows
from whisper_at_cli.extract.datasets.base import Clip, Dataset, as_text
from whisper_at_cli.extract.errors import UsageError

if TYPE_CHECKING:
    import datasets

LAYOUT = "a folder that datasets.save_to_disk wrote, with an Audio column; labels from its ClassLabel column"
MARKS = ("dataset_dict.json", "state.json")
SPLITS = {"train": "train", "validation": "valid", "valid": "valid", "dev": "valid", "test": "test", "eval": "eval"}
FAULTS = (  # what the library raises of a folder that is damaged or not its own
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError,
)  # fmt: skip


@dataclass(frozen=True)
class TableDataset(Dataset):
    """Clips whose audio lies in Arrow files, as bytes or as a path."""

    tables: tuple[str, ...] = ()  # Arrow files, in the order of their rows
    ends: tuple[int, ...] = ()  # rows up to and with each table
    column: str = "audio"

    of_files = False

    def is_there(self, row: int) -> bool:
        return self.source(row).is_there()

    def source(self, row: int) -> TableClip:
        row = self.source_row(row)
        table = bisect.bisect_right(self.ends, row)
        first = self.ends[table - 1] if table else 0
        return TableClip(self.tables[table], row - first, self.column, str(self.root))


def recognise(path: Path) -> bool:
    return (path / MARKS[0]).is_file() or all((path / name).is_file() for name in (MARKS[1], "dataset_info.json"))


def read(path: Path) -> TableDataset:
    """Every row of every split. Its audio is decoded as every other is, not by the library."""
    splits = _loaded(path)
    try:
        return _dataset(path, splits)
    except FAULTS as error:
        raise UsageError(f"{path} cannot be read as a dataset on disk: {error}") from error


def _loaded(path: Path) -> dict:
    """Tables by split, with undecoded audio."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{path} was written by the library datasets, which is not installed; run: pip install 'whisper-at-cli[hf]'"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
        return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    except FAULTS as error:
        raise UsageError(f"{path} cannot be loaded as a dataset on disk: {error}") from error


def _dataset(path: Path, splits: dict) -> TableDataset:
    import datasets

    first = next(iter(splits.values()))
    column = _column(first.features, datasets.Audio)
    if column is None:
        raise UsageError(f"{path} has no Audio column; its columns are {', '.join(first.features)}")
    label, class_names = _label_column(first.features)
    clips, tables, rows = [], [], []
    for split, table in splits.items():
        if str(table.features.get(label)) != str(first.features.get(label)):
            raise UsageError(f"{path}: the splits differ in their classes")
        clips += _clips(table, split, label, len(class_names))
        files = [file["filename"] for file in table.cache_files]
        tables += files
        rows += [arrow_rows(file) for file in files]
        if sum(rows) != len(clips):
            raise UsageError(f"{path}: split {split or 'train'} has {len(table)} rows and its Arrow files do not")
    if len({clip.id for clip in clips}) != len(clips):
        clips = [Clip(f"{clip.split}/{clip.id}", *_rest(clip)) for clip in clips]
    if len({clip.id for clip in clips}) != len(clips):
        raise UsageError(f"{path} names two clips alike in its column id")
    return TableDataset(
        path.resolve().name, path, tuple(clips), class_names, tables=tuple(tables), ends=tuple(accumulate(rows)),
        column=column,
    )  # fmt: skip


def _rest(clip: Clip) -> tuple:
    return clip.path, clip.labels, clip.fold, clip.split


def _clips(table: datasets.Dataset, split: str, label: str, classes: int) -> list[Clip]:
    rows = range(len(table))
    values = table[label][:] if label else [()] * len(table)
    ids = [as_text(str(name)) for name in table["id"][:]] if "id" in table.features else [str(row) for row in rows]
    folds = table["fold"][:] if "fold" in table.features else [0] * len(table)
    clips = []
    for row, name, value, fold in zip(rows, ids, values, folds, strict=True):
        numbers = (value,) if isinstance(value, int) else tuple(sorted(set(value or ())))
        numbers = tuple(number for number in numbers if number >= 0)  # -1 is the library's word for none
        if any(number >= classes for number in numbers):
            raise UsageError(f"row {row + 1} of split {split or 'train'} has label {max(numbers)} of {classes} classes")
        clips.append(
            Clip(name, f"{split}/{row}" if split else str(row), numbers, int(fold or 0), SPLITS.get(split, split))
        )
    return clips


def _column(features: datasets.Features, kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


def _label_column(features: datasets.Features) -> tuple[str, tuple[str, ...]]:
    """The first column of class labels, or of lists of them, and the names; ("", ()) without one."""
    import datasets

    for name, feature in features.items():
        inner = getattr(feature, "feature", None)  # of a list
        for candidate in (feature, inner[0] if isinstance(inner, list) and inner else inner):
            if isinstance(candidate, datasets.ClassLabel):
                return name, tuple(candidate.names)
    return "", ()
