"""The rows of a table of audio files: what each says of its clip."""

from __future__ import annotations

import ast
import posixpath
from pathlib import Path

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.cells import (
    NAME_CHARACTERS,
    PATH_CHARACTERS,
    as_fold,
    as_label,
    as_name,
    as_span,
    is_nan,
)  # fmt: skip
from whisper_at_cli.extract.datasets.columns import LABEL_NAMES, Columns, taken_columns
from whisper_at_cli.extract.datasets.locate import evenly, exists
from whisper_at_cli.extract.datasets.rows import NAN_LABEL, Entry, Rows, RowsBuilder
from whisper_at_cli.extract.datasets.splits import TABLES
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import JsonLines, Table, is_csv

SEPARATOR = ";"  # between labels
OTHER_SEPARATORS = (SEPARATOR, "|", ",")
TEXT_CHARACTERS = 100_000
LIST_CHARACTERS = 10_000  # of a list of labels that is written as Python writes it
BASES_CHECKED = 50


def read_rows(path: Path, said: list[str], *, one_by_one: bool = False) -> Rows:
    """The rows of a table; notes are appended to `said`. Raises UsageError with the place of what is wrong.

    A table whose rows are plain is read many rows at a time; any other, and all of them with `one_by_one`, row by row.
    """
    from whisper_at_cli.extract.datasets.plain import plain_builder

    table = Table(path) if is_csv(path) else JsonLines(path)
    columns = taken_columns(table, said) if isinstance(table, Table) else None
    found = None if one_by_one else plain_builder(table, columns)
    if found is not None:
        builder, columns, taken = found
        said += taken
    else:
        columns = columns or taken_columns(table, said)
        builder = RowsBuilder()
        for place, row in table.rows():
            builder.add(entry_of(row, place, columns))
            builder.lists = builder.lists or is_list(row.get(columns.label))
    said += table.notes
    rows = builder.rows(path)
    if columns.label and builder.without:
        said.append(notes.NAN_LABELS(clips=builder.without, table=path.name))
    if not builder.lists and rows.counts.max(initial=0) < 2:
        rows = _separated(rows, columns.label, path, said)
    return _whole_labels(rows, path, said)


def is_list(value: object) -> bool:
    """Whether a cell of labels is a list, or might be one as Python writes it."""
    return isinstance(value, list) or (isinstance(value, str) and value.startswith("["))


def _separated(rows: Rows, column: str, path: Path, said: list[str]) -> Rows:
    """Rows whose several labels stand in one cell without a ; between them, split where the column is `labels`."""
    for separator in OTHER_SEPARATORS:
        example = next((name for name in rows.names if separator in name.strip(separator)), "")
        if not example or (separator == "," and column != "labels"):  # many names of classes hold commas
            continue
        if column != "labels" or any(f"{separator} " in name for name in rows.names if separator == ","):
            said.append(notes.LABELS_WHOLE(table=path.name, separator=separator, example=example))
            return rows
        split = {name: tuple(dict.fromkeys(_stripped(name.split(separator)))) for name in rows.names}
        count = len(split[example])
        said.append(notes.LABELS_SPLIT(table=path.name, separator=separator, example=example, count=count))
        return rows.with_labels(split)
    return rows


def _stripped(parts: list[str]) -> list[str]:
    return [name for part in parts if (name := part.strip()) and not is_nan(name)]


def _whole_labels(rows: Rows, path: Path, said: list[str]) -> Rows:
    """Labels such as 1.0 as 1, where all are whole numbers."""
    if not any(name.endswith(".0") for name in rows.names):
        return rows
    whole = {name: name.removesuffix(".0") for name in rows.names}
    if not all(name.isascii() and name.isdecimal() for name in whole.values()):
        return rows
    old = min(name for name in rows.names if name.endswith(".0"))
    said.append(notes.WHOLE_LABELS(table=path.name, old=old, new=whole[old]))
    return rows.with_labels({name: (new,) for name, new in whole.items()})


def rebased(rows: Rows, table: Path, root: Path, *, may_move: bool) -> tuple[Path, Rows]:
    """Paths relative to a root: from the table's own folder, or from the root of the dataset, if more files are there
    or none are in either, so that they are looked for below the root.

    Of a table that was given as a file, the folder above its own may be the root.
    """
    some = evenly(len(rows), BASES_CHECKED)
    bases = [table.parent, table.parent.parent if may_move else root]
    there = [sum(exists(base, rows.audio[row]) for row in some) for base in bases]
    by_name = there == [0, 0] and (not may_move or table.parent.name.lower() in TABLES)
    if there[1] > there[0] or by_name:
        return (bases[1] if may_move else root), rows
    if table.parent == root:
        return root, rows
    inside = table.parent.relative_to(root).as_posix()
    return root, rows.with_audio(lambda path: _joined(inside, path))


def _joined(folder: str, path: str) -> str:
    return path if path.startswith("/") else posixpath.normpath(posixpath.join(folder, path))


def entry_of(row: dict, place: str, columns: Columns) -> Entry:
    """One row. Raises UsageError with its place for what it cannot mean."""
    audio = row.get(columns.audio)
    if audio in (None, "") or is_nan(audio):
        raise UsageError(f"{place} names no audio file")
    start, end = as_span(row.get("start"), row.get("end"), place) if columns.spans else (None, None)
    return Entry(
        place, as_name(audio, "audio", place, most=PATH_CHARACTERS), start, end,
        labels_of(row, place, columns), as_fold(row.get("fold"), place), _text(row, "split", place, most=64),
        _text(row, "id", place), _text(row, "text", place, most=TEXT_CHARACTERS),
    )  # fmt: skip


def _text(row: dict, column: str, place: str, *, most: int = NAME_CHARACTERS) -> str:
    value = row.get(column)
    return "" if value is None or is_nan(value) else as_name(value, column, place, most=most)


def labels_of(row: dict, place: str, columns: Columns) -> tuple[str, ...]:
    """The labels of a row, `NAN_LABEL` for pandas' nan.

    They are a list, or text with ; between labels in a column `labels`; in any other column it is one label.
    """
    several, one = row.get("labels"), row.get("label")
    if several not in (None, "", []) and one not in (None, ""):
        raise UsageError(f"{place} has both label and labels; give one of them")
    value = next(
        (row[name] for name in (columns.label, *LABEL_NAMES) if name and row.get(name) not in (None, "", [])), None
    )
    if value is None:
        return ()
    if is_nan(value):
        return NAN_LABEL
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = _written_list(value)
    if isinstance(value, str) and several not in (None, "", []):
        value = value.split(SEPARATOR)
    if not isinstance(value, list):
        value = [value]
    names = [as_label(name, place) for name in value if not is_nan(name)]
    return tuple(dict.fromkeys(name for name in names if name))


def _written_list(text: str) -> list | str:
    """A list as Python or JSON writes it, `['dog', 'rain']`; else the text as it is."""
    try:
        value = ast.literal_eval(text) if len(text) <= LIST_CHARACTERS else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, list) else text
