"""Manifests: a CSV with a header, or one JSON object per line, that lists audio files or parts of them.

A column of audio files is needed; `start`, `end` (seconds), labels, `fold`, `split`, `id` and `text` may be there.
Columns may have any of their common names. In a folder the table is looked for: `beside.py` says where.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cells import from_one
from whisper_at_cli.extract.datasets.base import Dataset, refuse_too_many_classes
from whisper_at_cli.extract.datasets.beside import SPREADSHEETS, Found, find_tables
from whisper_at_cli.extract.datasets.classes import ClassList, read_classes
from whisper_at_cli.extract.datasets.clips import Clips
from whisper_at_cli.extract.datasets.columns import AUDIO_NAMES
from whisper_at_cli.extract.datasets.entries import read_rows, rebased
from whisper_at_cli.extract.datasets.ids import clip_ids
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.datasets.rows import Rows, joined_rows
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.sparse import SparseLabels
from whisper_at_cli.extract.tables import CSV_SUFFIXES, JSONL_SUFFIXES, columns_of
from whisper_at_cli.extract.texts import TextColumn, first_repeated, text_column

LAYOUT = (
    "a .csv, .tsv or .jsonl file (or a folder with manifest.csv, metadata.csv or another table beside the audio) with "
    "audio and optionally start, end, label or labels, fold, split, id, text"
)


def recognise(path: Path) -> bool:
    if path.is_dir():
        return bool(find_tables(path).usable)
    if path.suffix.lower() in SPREADSHEETS:
        raise UsageError(f"{path} is a spreadsheet; save it as CSV")
    return path.suffix.lower() in CSV_SUFFIXES + JSONL_SUFFIXES or not set(AUDIO_NAMES).isdisjoint(columns_of(path))


def read(path: Path, *, labels: Path | None = None) -> Dataset:
    """Every row of a manifest, in its order, whether or not its file is there. Paths are relative to the manifest."""
    found = find_tables(path).chosen() if path.is_dir() else Found(path.parent, (path,))
    if not found.usable:
        raise UsageError(f"{path} is no manifest; give {LAYOUT}")
    said: list[str] = []
    tables: list[Rows] = []
    root = found.root
    for table in found.usable:
        root, own = rebased(read_rows(table, said), table, found.root, may_move=not path.is_dir())
        if split := found.splits.get(table):
            own = replace(own, split=np.where(own.split == "", text_column([split]), own.split))
        tables.append(own)
    classes = read_classes(labels, said) if labels else None
    dataset = dataset_of(joined_rows(tables), found.usable[0], classes, root, tuple(said), in_path_order=found.searched)
    name = dataset.name if not found.searched else root.resolve().name
    return replace(dataset, name=name, notes=dataset.notes + tuple(found.said(dataset.columns.paths)))


def dataset_of(
    rows: Rows, file: Path, classes: ClassList | None, root: Path, said: tuple[str, ...] = (), *,
    in_path_order: bool = False, relocate: bool = True,
) -> Dataset:  # fmt: skip
    """The dataset of a list of clips in `file`; class names are sorted where no list of classes says otherwise.

    With `relocate` files that are not where they are listed are looked for.
    """
    paths, more = located(root, rows.audio) if relocate else (rows.audio, [])
    if in_path_order:  # as without the table
        order = np.array(sorted(range(len(paths)), key=paths.tolist().__getitem__), dtype=np.int64)
        rows, paths = rows.take(order), paths[order]
    if classes is not None:
        names, number = classes.names, _numbers_in(classes, rows)
    else:
        names = tuple(sorted(rows.names))
        refuse_too_many_classes(names, file)
        index = {name: at for at, name in enumerate(names)}
        number = np.array([index[name] for name in rows.names], dtype=np.int64)
    labels = SparseLabels.ordered(rows.counts, number[rows.labels], len(names))
    folds, folds_said = from_one([None if fold < 0 else fold for fold in rows.fold.tolist()])
    clips = Clips(_ids(rows, paths), paths, labels, np.array(folds, np.int32), rows.split, rows.start, rows.end)
    texts = TextColumn(rows.text) if (rows.text != "").any() else ()
    return Dataset(file.stem, root, clips, names, texts=texts, notes=(*said, *more, *folds_said))


def _numbers_in(classes: ClassList, rows: Rows) -> np.ndarray:
    """(labels,) int64: each label's number in a list of classes. Raises UsageError for one that is not there."""
    number = np.array([classes.index.get(name, -1) for name in rows.names], dtype=np.int64)
    unknown = np.flatnonzero(number[rows.labels] < 0)
    if len(unknown):
        row = int(np.searchsorted(np.cumsum(rows.counts), unknown[0], side="right"))
        classes.numbers([rows.names[rows.labels[unknown[0]]]], rows.place(row))
    return number


def _ids(rows: Rows, paths: np.ndarray) -> np.ndarray:
    """The ids that the manifest gives, else those of the files. Raises UsageError where two are the same."""
    nameless = rows.id == ""
    if nameless.any() and not nameless.all():
        place = rows.place(int(np.flatnonzero(nameless)[0]))
        raise UsageError(f"{place} has no id, but others have; give every clip one, or none")
    if nameless.any():
        ids, twice = clip_ids(paths, rows.start, rows.end)
    else:
        ids, twice = rows.id, first_repeated(rows.id)
    if twice:
        row, earlier = twice
        before = rows.place(earlier).split(" of ")[0]
        raise UsageError(
            f"{rows.place(row)}: clip {ids[row]!r} was already named by {before}; ids must be unique (columns start "
            "and end, or a column id, tell clips of one file apart)"
        )
    return ids
