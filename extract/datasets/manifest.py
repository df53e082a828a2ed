"""Manifests: a CSV with a header, or one JSON object per line, that lists audio files or parts of them.

`audio` is needed; `start`, `end` (seconds), `label` or `labels`, `fold`, `split`, `id` and `text` may be there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from whisper_at_cli.extract.datasets import tables
from whisper_at_cli.extract.datasets.base import (
    Clip,
    Dataset,
    labels_as_rows,
    refuse_too_many_classes,
    segment_ids,
)  # fmt: skip
from whisper_at_cli.extract.datasets.classes import ClassList, read_classes
from whisper_at_cli.extract.datasets.scan import first_file
from whisper_at_cli.extract.errors import UsageError

LAYOUT = (
    "a .csv or .jsonl file (or a folder with manifest.csv or manifest.jsonl) with audio and optionally start, end, "
    "label or labels, fold, split, id, text"
)
NAMES = ("manifest.csv", "manifest.jsonl")
SEPARATOR = ";"  # between labels
TEXT_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True)
class Entry:
    """What a manifest says of one clip."""

    place: str
    audio: str
    start: float | None
    end: float | None
    labels: tuple[str, ...]
    fold: int
    split: str
    id: str
    text: str


def recognise(path: Path) -> bool:
    file = _manifest_of(path)
    if file is None:
        return False
    return "audio" in tables.csv_columns(file) if _is_csv(file) else _first_object_has_audio(file)


def read(path: Path, *, labels: Path | None = None) -> Dataset:
    """Every row of a manifest, in its order, whether or not its file is there. Paths are relative to the manifest."""
    file = _manifest_of(path)
    if file is None:
        raise UsageError(f"{path} is no manifest; give {LAYOUT}")
    rows = tables.csv_rows(file, needs=("audio",)) if _is_csv(file) else tables.jsonl_rows(file)
    entries = [entry_of(row, place) for place, row in rows]
    return dataset_of(entries, file, read_classes(labels) if labels else None)


def dataset_of(entries: list[Entry], file: Path, classes: ClassList | None) -> Dataset:
    """The dataset of a list of clips in `file`; class names are sorted where no list of classes says otherwise."""
    if classes is not None:
        names = classes.names
        labels = [classes.numbers(list(entry.labels), entry.place) for entry in entries]
    else:
        names = tuple(sorted({name for entry in entries for name in entry.labels}))
        refuse_too_many_classes(names, file)
        labels = labels_as_rows([entry.labels for entry in entries], names)
    clips = tuple(
        Clip(name, entry.audio, row, entry.fold, entry.split, entry.start, entry.end)
        for name, entry, row in zip(_ids(entries), entries, labels, strict=True)
    )
    texts = tuple(entry.text for entry in entries) if any(entry.text for entry in entries) else ()
    return Dataset(file.stem, file.parent, clips, names, texts=texts)


def entry_of(row: dict, place: str) -> Entry:
    """One row. Raises UsageError with its place for what it cannot mean."""
    if row.get("audio") in (None, ""):
        raise UsageError(f"{place} names no audio file")
    start, end = tables.as_span(row.get("start"), row.get("end"), place)
    return Entry(
        place, tables.as_name(row["audio"], "audio", place, most=tables.PATH_CHARACTERS), start, end,
        _labels(row, place), tables.as_fold(row.get("fold"), place), _text(row, "split", place, most=64),
        _text(row, "id", place), _text(row, "text", place, most=TEXT_CHARACTERS),
    )  # fmt: skip


def _text(row: dict, column: str, place: str, *, most: int = tables.NAME_CHARACTERS) -> str:
    value = row.get(column)
    return "" if value is None else tables.as_name(value, column, place, most=most)


def _labels(row: dict, place: str) -> tuple[str, ...]:
    """`labels` is a list, or text with ; between; `label` is one label."""
    several, one = row.get("labels"), row.get("label")
    if several not in (None, "", []) and one not in (None, ""):
        raise UsageError(f"{place} has both label and labels; give one of them")
    if one not in (None, ""):
        return (tables.as_name(one, "label", place),)
    if several is None:
        return ()
    if isinstance(several, str):
        several = several.split(SEPARATOR)
    if not isinstance(several, list):
        several = [several]
    names = [tables.as_name(name, "a label", place) for name in several]
    return tuple(dict.fromkeys(name for name in names if name))


def _ids(entries: list[Entry]) -> list[str]:
    """The ids that the manifest gives, else those of the files. Raises UsageError where two are the same."""
    if any(entry.id for entry in entries):
        nameless = next((entry for entry in entries if not entry.id), None)
        if nameless:
            raise UsageError(f"{nameless.place} has no id, but others have; give every clip one, or none")
        ids = [entry.id for entry in entries]
    else:
        ids = segment_ids([entry.audio for entry in entries], [(entry.start, entry.end) for entry in entries])
    _refuse_twice(ids, entries)
    return ids


def _refuse_twice(ids: Iterable[str], entries: list[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for name, entry in zip(ids, entries, strict=True):
        if name in seen:
            raise UsageError(
                f"{entry.place}: clip {name!r} was already named by {seen[name].place.split(' of ')[0]}; ids must be "
                "unique (a column id can tell clips apart)"
            )
        seen[name] = entry


def _manifest_of(path: Path) -> Path | None:
    return path if path.is_file() else first_file(path, *NAMES)


def _is_csv(file: Path) -> bool:
    return file.suffix.lower() not in (".jsonl", ".ndjson", ".json")


def _first_object_has_audio(file: Path) -> bool:
    try:
        return any("audio" in row for _, (_, row) in zip(range(1), tables.jsonl_rows(file), strict=False))
    except UsageError:
        return False
