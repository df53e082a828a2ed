"""Reading what others wrote: CSV and JSON files, whatever is in them. Every fault is a UsageError with its place."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import SupportsFloat

from whisper_at_cli.extract.errors import UsageError

LINE_CHARACTERS = 1 << 20  # at most; a longer one is no line of a table
NAME_CHARACTERS, PATH_CHARACTERS = 1024, 4096
MAX_FOLD = 32767


def csv_rows(path: Path, *, needs: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row with its place, as `line 3 of clips.csv`. Raises UsageError for what is no such CSV file."""
    with _opened(path, "CSV") as lines:
        reader = csv.DictReader(lines)
        columns = [(name or "").strip() for name in reader.fieldnames or ()]
        missing = [column for column in needs if column not in columns]
        if missing:
            raise UsageError(f"{path} lacks the column {missing[0]!r}; it has {_shown(columns)}")
        reader.fieldnames = columns
        for row in reader:
            place = f"line {reader.line_num} of {path}"
            if None in row:
                raise UsageError(f"{place} has more fields than the first line names; put quotes around what holds a ,")
            yield place, {name: value or "" for name, value in row.items()}


def plain_csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Each row of a CSV file without a header, with its place; lines that begin with # and empty ones are left out."""
    with _opened(path, "CSV") as lines:
        number = 0

        def counted() -> Iterator[str]:
            nonlocal number
            for line in lines:
                number += 1
                if line.strip() and not line.startswith("#"):
                    yield line

        for row in csv.reader(counted(), skipinitialspace=True):
            yield f"line {number} of {path}", row


def csv_columns(path: Path) -> list[str]:
    """The first line's columns, empty for what is no CSV file."""
    try:
        with _opened(path, "CSV") as lines:
            return [name.strip() for name in next(csv.reader(lines), [])]
    except UsageError:
        return []


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Each object of a file with one JSON object per line, with its place."""
    with _opened(path, "JSON lines") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"line {number} of {path}"
                row = parsed(line, place)
                if not isinstance(row, dict):
                    raise UsageError(f"{place} is not a JSON object such as {{'audio': 'a.wav', 'label': 'dog'}}")
                yield place, row


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not empty."""
    with _opened(path, "text") as lines:
        yield from (line.strip() for line in lines if line.strip())


def whole_json(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a readable JSON file: {error}") from error
    return parsed(text, str(path))


def parsed(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON: {error}") from error


class _opened:
    """The lines of a text file; what goes wrong while they are read is a UsageError."""

    def __init__(self, path: Path, kind: str):
        self.path, self.kind = path, kind

    def __enter__(self) -> Iterator[str]:
        try:
            self.file = open(self.path, newline="", encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path} cannot be read: {error}") from error
        return self._lines()

    def _lines(self) -> Iterator[str]:
        while line := self.file.readline(LINE_CHARACTERS):
            if len(line) == LINE_CHARACTERS:
                raise UsageError(f"{self.path} is not a readable {self.kind} file: a line is longer than a megabyte")
            yield line

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.file.close()
        if isinstance(error, UnicodeDecodeError | csv.Error | OSError):
            raise UsageError(f"{self.path} is not a readable {self.kind} file: {error}") from error


def as_name(value: object, what: str, place: str, *, most: int = NAME_CHARACTERS) -> str:
    """Text that can be stored: no longer than `most`, on one line. Numbers are taken as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value}"
    if not isinstance(value, str):
        raise UsageError(f"{place}: {what} is {_shown(value)}, not text")
    if len(value) > most or "\0" in value or ("\n" in value.strip() and what != "audio"):
        raise UsageError(f"{place}: {what} is {_shown(value)}; give at most {most} characters on one line")
    value = value.strip() if what != "audio" else value
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{place}: {what} is {_shown(value)}, which is not text") from None
    return value


def as_seconds(value: object, what: str, place: str) -> float | None:
    """Seconds from 0, None where nothing was given."""
    if value is None or value == "":
        return None
    try:
        seconds = float(value) if isinstance(value, str | SupportsFloat) and not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < 1e9:
        raise UsageError(f"{place}: {what} is {_shown(value)}; give seconds from 0")
    return seconds


def as_span(start: object, end: object, place: str) -> tuple[float | None, float | None]:
    start, end = as_seconds(start, "start", place), as_seconds(end, "end", place)
    if end is not None and end <= (start or 0.0):
        raise UsageError(f"{place}: end is {end:g} and start {start or 0:g}; a clip ends after its start")
    return start, end


def as_fold(value: object, place: str) -> int:
    if value is None or value == "":
        return 0
    text = str(value).strip()
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal() and len(text) < 8 and int(text) <= MAX_FOLD):
        raise UsageError(f"{place}: fold is {_shown(value)}; give a whole number from 0 (none) to {MAX_FOLD}")
    return int(text)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
