"""Manifests: a CSV with a header, or one JSON object per line, that lists audio files or parts of them.

A column of audio files is needed; `start`, `end` (seconds), labels, `fold`, `split`, `id` and `text` may be there.
Columns may have any of their common names. In a folder the table is looked for: `beside.py` says where.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from whisper_at_cli.extract.cells import from_one
from whisper_at_cli.extract.datasets.base import (
    Clip,
    Dataset,
    labels_as_rows,
    refuse_too_many_classes,
    segment_ids,
)  # fmt: skip
from whisper_at_cli.extract.datasets.beside import SPREADSHEETS, Found, find_tables
from whisper_at_cli.extract.datasets.classes import ClassList, read_classes
from whisper_at_cli.extract.datasets.columns import AUDIO_NAMES
from whisper_at_cli.extract.datasets.entries import Entry, read_entries, rebased
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import CSV_SUFFIXES, JSONL_SUFFIXES, columns_of

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
    entries: list[Entry] = []
    root = found.root
    for table in found.usable:
        root, own = rebased(read_entries(table, said), table, found.root, may_move=not path.is_dir())
        entries += [replace(entry, split=entry.split or found.splits.get(table, "")) for entry in own]
    classes = read_classes(labels, said) if labels else None
    dataset = dataset_of(entries, found.usable[0], classes, root, tuple(said), in_path_order=found.searched)
    more = found.said({posixpath.normpath(clip.path) for clip in dataset.clips})
    name = dataset.name if not found.searched else root.resolve().name
    return replace(dataset, name=name, notes=dataset.notes + tuple(more))


def dataset_of(
    entries: list[Entry], file: Path, classes: ClassList | None, root: Path, said: tuple[str, ...] = (), *,
    in_path_order: bool = False,
) -> Dataset:  # fmt: skip
    """The dataset of a list of clips in `file`; class names are sorted where no list of classes says otherwise."""
    paths, more = located(root, [entry.audio for entry in entries])
    if in_path_order:  # as without the table
        order = sorted(range(len(paths)), key=paths.__getitem__)
        entries, paths = [entries[row] for row in order], [paths[row] for row in order]
    if classes is not None:
        names = classes.names
        labels = [classes.numbers(list(entry.labels), entry.place) for entry in entries]
    else:
        names = tuple(sorted({name for entry in entries for name in entry.labels}))
        refuse_too_many_classes(names, file)
        labels = labels_as_rows([entry.labels for entry in entries], names)
    folds, folds_said = from_one([entry.fold for entry in entries])
    clips = tuple(
        Clip(name, path, row, fold, entry.split, entry.start, entry.end)
        for name, path, entry, row, fold in zip(_ids(entries, paths), paths, entries, labels, folds, strict=True)
    )
    texts = tuple(entry.text for entry in entries) if any(entry.text for entry in entries) else ()
    return Dataset(file.stem, root, clips, names, texts=texts, notes=(*said, *more, *folds_said))


def _ids(entries: list[Entry], paths: list[str]) -> list[str]:
    """The ids that the manifest gives, else those of the files. Raises UsageError where two are the same."""
    if any(entry.id for entry in entries):
        nameless = next((entry for entry in entries if not entry.id), None)
        if nameless:
            raise UsageError(f"{nameless.place} has no id, but others have; give every clip one, or none")
        ids = [entry.id for entry in entries]
    else:
        ids = segment_ids(paths, [(entry.start, entry.end) for entry in entries])
    _refuse_twice(ids, entries)
    return ids


def _refuse_twice(ids: Iterable[str], entries: list[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for name, entry in zip(ids, entries, strict=True):
        if name in seen:
            raise UsageError(
                f"{entry.place}: clip {name!r} was already named by {seen[name].place.split(' of ')[0]}; ids must be "
                "unique (columns start and end, or a column id, tell clips of one file apart)"
            )
        seen[name] = entry
