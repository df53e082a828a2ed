"""A folder that Hugging Face `datasets` wrote with `save_to_disk`, or the Parquet files of its hub.

Needs that library (extra `hf`).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.audio.sources import TableClip, arrow_rows
from whisper_at_cli.extract.cells import as_fold, as_label, from_one, is_nan
from whisper_at_cli.extract.datasets.base import Clip, Dataset, as_text, refuse_too_many_classes
from whisper_at_cli.extract.datasets.columns import LABEL_NAMES, WANTED_LABELS, taken_text
from whisper_at_cli.extract.datasets.scan import folders_of
from whisper_at_cli.extract.datasets.splits import SPLITS
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import column_name

if TYPE_CHECKING:
    import datasets

LAYOUT = (
    "a folder that datasets.save_to_disk wrote, or one with the .parquet files of the hub, with an Audio column; "
    "labels from its column label, labels, category, class or target, else from its first ClassLabel column"
)
MARKS = ("dataset_dict.json", "state.json")
PARQUET = re.compile(r"(.+?)(?:-[0-9]{5}-of-[0-9]{5}.*)?\.parquet", re.IGNORECASE)  # split-00000-of-00001-HASH.parquet
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
    saved = (path / MARKS[0]).is_file() or all((path / name).is_file() for name in (MARKS[1], "dataset_info.json"))
    return saved or bool(_parquet_files(path))


def _parquet_files(path: Path) -> dict[str, list[str]]:
    """Parquet files by split: one file, those in a folder or in its `data/`, or those in folders of splits, as
    `default/train/0000.parquet`."""
    if path.suffix.lower() == ".parquet" and path.is_file():
        return {_split_of_file(path): [str(path)]}
    found: dict[str, list[str]] = {}
    for folder in (path, path / "data"):
        for file in sorted(folder.glob("*.parquet")) if not found else ():
            found.setdefault(_split_of_file(file), []).append(str(file))
    return found or _of_split_folders(path)


def _split_of_file(file: Path) -> str:
    match = PARQUET.fullmatch(file.name)
    return match[1].lower() if match and match[1].lower() in SPLITS else "train"


def _of_split_folders(path: Path) -> dict[str, list[str]]:
    """Raises UsageError where several configurations of a dataset lie side by side."""
    found: dict[str, list[str]] = {}
    configurations = []
    for folder in (path, *folders_of(path)):
        files = {name: sorted((folder / name).glob("*.parquet")) for name in SPLITS if (folder / name).is_dir()}
        if any(files.values()):
            configurations.append(folder.name)
            found |= {name: list(map(str, each)) for name, each in files.items() if each}
    if len(configurations) > 1:
        raise UsageError(f"{path} holds several datasets: {', '.join(configurations)}; give one of these folders")
    return found


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
        files = _parquet_files(path)
        loaded = _unpacked(files) if files else datasets.load_from_disk(str(path))
        return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    except FAULTS as error:
        raise UsageError(f"{path} cannot be loaded as a dataset on disk: {error}") from error


def _unpacked(files: dict[str, list[str]]) -> datasets.DatasetDict:
    """Parquet files as Arrow files in the library's own cache."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("parquet", data_files=files)
    finally:
        if shown:
            datasets.enable_progress_bars()


def _dataset(path: Path, splits: dict) -> TableDataset:
    import datasets

    first, root = next(iter(splits.values())), path.parent if path.is_file() else path
    column = next((name for name, feature in first.features.items() if isinstance(feature, datasets.Audio)), None)
    if column is None:
        raise UsageError(f"{path} has no Audio column; its columns are {', '.join(first.features)}")
    label = _label_column(first.features)
    labels = _Labels(path, label, first.features.get(label), splits)
    clips, given, tables, rows = [], [], [], []
    for split, table in splits.items():
        if str(table.features.get(label)) != str(first.features.get(label)):
            raise UsageError(f"{path}: the splits differ in their classes")
        of_split, folds_of_split = _clips(table, split, labels)
        clips += of_split
        given += folds_of_split
        files = [file["filename"] for file in table.cache_files]
        tables += files
        rows += [arrow_rows(file) for file in files]
        if sum(rows) != len(clips):
            raise UsageError(f"{path}: split {split or 'train'} has {len(table)} rows and its Arrow files do not")
    folds, said = from_one(given)
    clips = [replace(clip, fold=fold) for clip, fold in zip(clips, folds, strict=True)]
    if len({clip.id for clip in clips}) != len(clips):
        clips = [replace(clip, id=f"{clip.split}/{clip.id}") for clip in clips]
    if len({clip.id for clip in clips}) != len(clips):
        raise UsageError(f"{path} has the same value twice in its column id")
    taken = [("audio", column)] + ([("labels", label)] if label else [])
    said.append(notes.COLUMNS_TAKEN(table=path.name, taken=taken_text(taken)))
    if not label:
        wanted = ", ".join(WANTED_LABELS)
        said.append(notes.NO_LABEL_COLUMN(table=path.name, wanted=wanted, columns=", ".join(first.features)[:300]))
    name = path.stem if path.is_file() else path.resolve().name
    return TableDataset(
        name, root, tuple(clips), labels.names, tables=tuple(tables), ends=tuple(accumulate(rows)),
        column=column, notes=tuple(said),
    )  # fmt: skip


def _clips(table: datasets.Dataset, split: str, labels: _Labels) -> tuple[list[Clip], list[int | None]]:
    """The clips of a split without their folds, and these."""
    rows = range(len(table))
    values = table[labels.column][:] if labels.column else [None] * len(table)
    ids = [as_text(str(name)) for name in table["id"][:]] if "id" in table.features else [str(row) for row in rows]
    folds = table["fold"][:] if "fold" in table.features else [None] * len(table)
    clips, numbered = [], []
    for row, name, value, fold in zip(rows, ids, values, folds, strict=True):
        place = f"row {row + 1} of split {split or 'train'}"
        path, numbers = f"{split}/{row}" if split else str(row), labels.numbers(value, place)
        clips.append(Clip(name, path, numbers, split=SPLITS.get(split.lower(), split)))
        numbered.append(as_fold(fold, place))
    return clips, numbered


class _Labels:
    """Class names of a column, as its feature lists them or as its values are, and the numbers of a row's labels."""

    def __init__(self, path: Path, column: str, feature: object, splits: dict):
        import datasets

        self.column = column
        inner = _inner(feature)
        self.listed = isinstance(inner, datasets.ClassLabel)
        if isinstance(inner, datasets.ClassLabel):
            self.names = tuple(inner.names)
            return
        values = {value for table in splits.values() if column for row in table[column][:] for value in _each(row)}
        numbers = all(isinstance(value, int) for value in values)
        ordered = sorted(values) if numbers else sorted(values, key=str)
        self.names = tuple(dict.fromkeys(as_label(value, str(path)) for value in ordered))
        refuse_too_many_classes(self.names, path)
        self.index = {name: at for at, name in enumerate(self.names)}

    def numbers(self, value: object, place: str) -> tuple[int, ...]:
        if self.listed:
            numbers = {number for number in _each(value) if number >= 0}  # -1 is the library's word for none
            if any(number >= len(self.names) for number in numbers):
                raise UsageError(f"{place} has label {max(numbers)} of {len(self.names)} classes")
            return tuple(sorted(numbers))
        return tuple(sorted({self.index[as_label(each, place)] for each in _each(value)}))


def _each(value: object) -> list:
    """The labels of a row: of one label or a list of them, none that is empty."""
    values: Iterable = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if each is not None and each != "" and not is_nan(each)]


def _inner(feature: object) -> object:
    """What a feature is, or what a list holds."""
    inner = getattr(feature, "feature", None)
    if isinstance(feature, list) and feature:
        return feature[0]
    return feature if inner is None else inner[0] if isinstance(inner, list) and inner else inner


def _label_column(features: datasets.Features) -> str:
    """The column of labels by its name, else the first of class labels, or of lists of them; nothing without one."""
    import datasets

    by_name = {column_name(name): name for name, feature in features.items() if _can_be_label(_inner(feature))}
    named = next((by_name[name] for name in LABEL_NAMES if name in by_name), "")
    return named or next(
        (name for name, feature in features.items() if isinstance(_inner(feature), datasets.ClassLabel)), ""
    )


def _can_be_label(feature: object) -> bool:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and (
        feature.dtype in ("string", "large_string", "bool") or feature.dtype.startswith(("int", "uint", "float"))
    )
