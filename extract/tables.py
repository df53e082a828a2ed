"""Reading tables that others wrote: CSV with any common separator and encoding, JSON lines, lists of lines.

The one reader of tables of this product: manifests, the CSV files of published datasets, lists of classes, transcripts.
What is read is what stands there, or a UsageError names the line: nothing is dropped or shifted in silence. What a user
should know of how a table was read is in `notes`.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.errors import UsageError

CSV_SUFFIXES, JSONL_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".ndjson")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
LINE_CHARACTERS = 1 << 20  # at most; a longer one is no line of a table
CHUNK_BYTES = 1 << 20
BLOCK_CHARACTERS = 1 << 18  # read at once; fewer than a line may have
BLOCK_CELLS = 1 << 22  # at most, of what is read at once
COLUMNS_CHARACTERS = 300  # of a table's columns that a message shows
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
FALLBACK = "cp1252"  # what Windows calls Latin-1
SCAN = json.JSONDecoder().raw_decode  # a value and where it ends
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
EXCEL_HINT = re.compile(r'"?sep=(.)"?\s*')  # Excel's first line that names the separator
USUAL_COLUMNS = frozenset("audio path file file_name filename id label labels category fold split text start".split())


class NotPlainError(Exception):
    """A table that cannot be read many rows at a time: read it row by row, which says what is wrong if anything is."""


class Block(NamedTuple):
    """Some rows of a table: their line numbers, (rows,) int64, and columns of cells under the names of columns."""

    numbers: np.ndarray
    columns: dict[str, list]


class TextFile:
    """The lines of a text file in UTF-8, UTF-16, UTF-32 or Windows-1252; faults while reading are UsageErrors."""

    def __init__(self, path: Path, kind: str):
        self.path, self.kind = path, kind
        self.notes: list[str] = []
        with self._refusing():
            self.encoding, sample = encoding_of(path)
        if sample:
            self.notes.append(notes.TABLE_ENCODING(table=path.name, sample=repr(sample)))

    def lines(self) -> Iterator[tuple[int, str]]:
        """Each line, with its end, and its number from 1."""
        with self._refusing(), open(self.path, newline="", encoding=self.encoding) as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_CHARACTERS), ""), start=1):
                self._check(number, line)
                yield number, line

    def plain_blocks(self) -> Iterator[tuple[int, list[str]]]:
        """Many lines at a time, without their ends, and the number of the first from 1.

        Raises NotPlainError where `lines` would refuse one, or ends it elsewhere.
        """
        number = 1
        with open(self.path, newline="", encoding=self.encoding) as file:
            while text := file.read(BLOCK_CHARACTERS):
                if text[-1] != "\n":
                    text += file.readline(LINE_CHARACTERS)
                text = text.replace("\r\n", "\n")
                lines = text.removesuffix("\n").split("\n")
                if "\r" in text or CONTROL.search(text) or len(lines[-1]) > LINE_CHARACTERS - BLOCK_CHARACTERS:
                    raise NotPlainError(f"line {number} or one that follows")
                yield number, lines
                number += len(lines)

    def text(self) -> str:
        """All of it, whatever the length of its lines."""
        with self._refusing():
            return self.path.read_text(encoding=self.encoding)

    def _check(self, number: int, line: str) -> None:
        if len(line) == LINE_CHARACTERS:
            raise csv.Error(f"line {number}: a line is longer than a megabyte")
        if found := CONTROL.search(line):
            raise csv.Error(f"line {number} holds the control character {found[0]!r}, which is not text")

    def _refusing(self) -> _Refusing:
        return _Refusing(self.path, self.kind)


class _Refusing:
    """A context in which what goes wrong with a file is a UsageError that names it."""

    def __init__(self, path: Path, kind: str):
        self.path, self.kind = path, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UnicodeError):
            raise UsageError(
                f"{self.path} is not a readable {self.kind} file: it is neither UTF-8 nor Windows-1252 text; save it "
                "as UTF-8"
            ) from error
        if isinstance(error, csv.Error | OSError | ValueError):
            raise UsageError(f"{self.path} is not a readable {self.kind} file: {error}") from error


def encoding_of(path: Path) -> tuple[str, str]:
    """The encoding of a text file; and, where it could only be guessed, a word that shows how it comes out."""
    with open(path, "rb") as file:
        head = file.read(CHUNK_BYTES)
        for mark, encoding in BYTE_ORDER_MARKS.items():
            if head.startswith(mark):
                return encoding, ""
        if utf16 := _utf16_without_mark(head[:4096]):
            return utf16, ""
        decoder, before = codecs.getincrementaldecoder("utf-8")(), b""
        while head:
            following = file.read(CHUNK_BYTES)
            try:
                decoder.decode(head, final=not following)
            except UnicodeDecodeError as error:
                around = (before[-40:] + head)[max(0, error.start - 3) :][:80]
                return FALLBACK, _odd_word(around.decode(FALLBACK, "replace"))
            before, head = head, following
    return "utf-8", ""


def _utf16_without_mark(head: bytes) -> str:
    """UTF-16 where most of every second byte is zero, as in mostly Latin text."""
    pairs = len(head) // 2
    if pairs < 4:
        return ""
    odd, even = head[1::2].count(0), head[0::2].count(0)
    if odd > 0.6 * pairs and even < 0.1 * pairs:
        return "utf-16-le"
    return "utf-16-be" if even > 0.6 * pairs and odd < 0.1 * pairs else ""


def _odd_word(text: str) -> str:
    words = [word for word in re.findall(r"\w+", text) if not word.isascii()]
    return words[0] if words else text[:20].strip() or "?"


def column_name(name: str) -> str:
    """A column's name as names are compared: `File Name ` is `file_name`."""
    return re.sub(r"[\s-]+", "_", name.strip(" \t\r\n\ufeff\xa0").casefold())


class Table:
    """A CSV table with a header: rows of text by column, under the columns' names as `column_name` gives them.

    Cells are stripped, blank rows are no rows, fields that a row lacks are empty. Raises UsageError, with the line, for
    a quote that is not closed, for fields beyond the header, and for what is not text.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = TextFile(path, "CSV")
        self.notes = self._file.notes
        self._skipped = 0  # lines before the header
        self.separator, header = self._header()
        self.columns = tuple(name.strip() for name in header)  # as they are written
        self.names = tuple(column_name(name) for name in header)
        self._literal = self.separator == "\t" and {"client_id", "sentence"} <= set(self.names)  # of Common Voice
        encoding = "" if self._file.encoding in ("utf-8", "utf-8-sig", FALLBACK) else self._file.encoding.upper()
        separated = "" if self.separator == "," else f"a table separated by {SEPARATORS[self.separator]}"
        if encoding or separated:
            form = " in ".join(part for part in (separated or "a table", encoding) if part)
            self.notes.append(notes.TABLE_FORM(table=path.name, form=form))

    def _header(self) -> tuple[str, list[str]]:
        for number, line in self._file.lines():
            hint = EXCEL_HINT.fullmatch(line) if number == 1 else None
            if hint and hint[1] in SEPARATORS:
                continue
            if line.strip():
                self._skipped = number - 1
                return self._split_header(line)
        return ",", []

    def _split_header(self, line: str) -> tuple[str, list[str]]:
        """The separator under which the first line names most columns, and these."""
        found = {}
        for separator in SEPARATORS:
            try:
                found[separator] = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
            except csv.Error as error:
                raise UsageError(f"{self.path} is not a readable CSV file: {error}") from error
        usual = {
            separator: len(USUAL_COLUMNS.intersection(map(column_name, names))) for separator, names in found.items()
        }
        separator = max(found, key=lambda separator: (usual[separator], len(found[separator])))
        return separator, found[separator]

    def column(self, *names: str) -> str | None:
        """The first of these columns that there is. Raises UsageError where it is there twice."""
        taken = next((name for name in names if name in self.names), None)
        if taken is not None and self.names.count(taken) > 1:
            raise UsageError(f"{self.path} names the column {taken!r} twice; rename one of them")
        return taken

    def need(self, *names: str) -> None:
        """Raise UsageError unless all of these columns are there."""
        missing = [name for name in names if self.column(name.casefold()) is None]
        if missing:
            raise UsageError(f"{self.path} lacks the column {missing[0]!r}; its columns are {self.described()}")

    def described(self) -> str:
        """Its columns, for a message."""
        names = [name or "(no name)" for name in self.columns]
        return ", ".join(names)[:COLUMNS_CHARACTERS] if names else "none: it is empty"

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Each row with its place, as `line 3 of clips.csv`."""
        short, first = 0, 0
        records = self._records()
        next(records, None)  # the header
        for line, fields in records:
            cells = [field.strip() for field in fields]
            if not any(cells):
                continue
            if any(cells[len(self.names) :]):
                raise UsageError(
                    f"line {line} of {self.path} has more fields than the header ({len(cells)}, not "
                    f"{len(self.names)}); put quotes around fields that hold a {self.separator!r}"
                )
            if len(cells) < len(self.names):
                short, first = short + 1, first or line
                cells += [""] * (len(self.names) - len(cells))
            yield f"line {line} of {self.path}", dict(zip(self.names, cells, strict=False))
        self._say_short(short, first)

    def _say_short(self, short: int, first: int) -> None:
        said = notes.SHORT_ROWS(rows=short, table=self.path.name, line=first)
        if short and said not in self.notes:  # it may be read twice
            self.notes.append(said)

    def plain_blocks(self, names: Iterable[str]) -> Iterator[Block]:
        """The rows that `rows` gives, many at a time and of these columns only.

        Raises NotPlainError where it cannot be told so fast that they are the same.
        """
        kept = {name: at for at, name in enumerate(self.names) if name in set(names)}  # of a name twice, the last
        short, first = 0, 0
        for number, lines in self._file.plain_blocks():
            skipped = min(len(lines), max(0, self._skipped + 2 - number))  # up to the header and with it
            if skipped and number + skipped == self._skipped + 2:
                self._split_plain(lines[skipped - 1 : skipped])
            rows = self._split_plain(lines[skipped:])
            numbers = np.arange(number + skipped, number + len(lines))
            lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
            if len(rows) * len(self.names) > BLOCK_CELLS:
                raise NotPlainError("more cells than text")
            if (lengths != len(self.names)).any() or not all(map(any, rows)):
                there = [index for index, row in enumerate(rows) if any(map(str.strip, row))]
                rows, numbers, lengths = [rows[index] for index in there], numbers[there], lengths[there]
                if any(cell.strip() for row in rows for cell in row[len(self.names) :]):
                    raise NotPlainError("more fields than the header")
                lacking = np.flatnonzero(lengths < len(self.names))
                short, first = short + len(lacking), first or (int(numbers[lacking[0]]) if len(lacking) else 0)
                rows = [row + [""] * (len(self.names) - len(row)) for row in rows]
            cells = list(zip(*rows, strict=False))
            if cells:
                yield Block(numbers, {name: list(map(str.strip, cells[at])) for name, at in kept.items()})
        self._say_short(short, first)

    def _split_plain(self, lines: list[str]) -> list[list[str]]:
        """The fields of lines of which each is a record."""
        if self._literal:
            return [line.split("\t") for line in lines]
        try:
            rows = list(csv.reader(lines, delimiter=self.separator, skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise NotPlainError(str(error)) from error
        if len(rows) != len(lines):
            raise NotPlainError("a record of several lines")
        return rows

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """The fields of each row, the header first, and the line on which it begins."""
        lines = ((number, line) for number, line in self._file.lines() if number > self._skipped)
        if self._literal:
            yield from ((number, line.rstrip("\r\n").split("\t")) for number, line in lines)
            return
        feed = _Feed(lines)
        reader = csv.reader(feed, delimiter=self.separator, skipinitialspace=True, strict=True)
        while True:
            feed.begin()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = (self._spaced(feed) if "expected after" in str(error) else []) or self._refuse(feed, error)
            if len(feed.lines) > 1:
                self._refuse_swallowed_rows(feed)
            yield feed.first, row

    def _spaced(self, feed: _Feed) -> list[str]:
        """The fields of a row that has spaces between closing quotes and separators; empty for what is none."""
        space = r" *" if self.separator == "\t" else r"[ \t]*"
        field = re.compile(
            rf'{space}(?:"((?:[^"]|"")*)"{space}|([^"{self.separator}\r\n][^{self.separator}\r\n]*|))'
            rf"({self.separator}|(?:\r\n?|\n)?\Z)"
        )
        text, at, fields = "".join(feed.lines), 0, []
        while match := field.match(text, at):
            fields.append(match[2] if match[1] is None else match[1].replace('""', '"'))
            at = match.end()
            if match[3] != self.separator:
                return fields if at == len(text) else []
        return []

    def _refuse(self, feed: _Feed, error: csv.Error) -> list[str]:
        place = f"line {feed.first} of {self.path}"
        if len(feed.lines) > 1 or "unexpected end" in str(error):
            raise UsageError(f'{place} opens a quote (") that is not closed; close it, or write "" for a quote')
        problem = "has text behind a closing quote" if "expected after" in str(error) else f"cannot be read: {error}"
        raise UsageError(f'{place} {problem}; write "" for a quote within a field')

    def _refuse_swallowed_rows(self, feed: _Feed) -> None:
        """A field may have lines of its own; if one of them looks like a row, a quote was left open."""
        needed, header = max(1, len(self.names) - 1), feed.first == self._skipped + 1
        for number, line in enumerate(feed.lines[1:], start=feed.first + 1):
            if header or len(self.names) == 1 or line.count(self.separator) >= needed:
                raise UsageError(
                    f'line {feed.first} of {self.path} opens a quote (") that line {feed.first + len(feed.lines) - 1} '
                    f'closes, and line {number} looks like a row of its own; close it, or write "" for a quote'
                )


class _Feed:
    """Lines for csv.reader that remembers those of the record it is reading."""

    def __init__(self, lines: Iterator[tuple[int, str]]):
        self._source = lines
        self.begin()

    def begin(self) -> None:
        self.lines: list[str] = []
        self.first = 0

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        number, line = next(self._source)
        self.first = self.first or number
        self.lines.append(line)
        return line


def plain_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Each row of a CSV file without a header, with its place; lines that begin with # and empty ones are left out."""
    lines = ((n, line) for n, line in TextFile(path, "CSV").lines() if line.strip() and not line.startswith("#"))
    feed = _Feed(lines)
    reader = csv.reader(feed, skipinitialspace=True, strict=True)
    while True:
        feed.begin()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"line {feed.first} of {path} cannot be read: {error}; are its quotes closed?") from error
        if len(feed.lines) > 1:
            raise UsageError(f'line {feed.first} of {path} opens a quote (") that is not closed on that line')
        yield f"line {feed.first} of {path}", [cell.strip() for cell in row]


class JsonLines:
    """A file with one JSON object per line, or one list of objects; keys are compared as `column_name` gives them."""

    def __init__(self, path: Path):
        self.path = path
        self._file = TextFile(path, "JSON lines")
        self.notes = self._file.notes

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Each object with its place."""
        for place, row in self._values():
            if not isinstance(row, dict):
                raise UsageError(f"{place} is not a JSON object such as {{'audio': 'a.wav', 'label': 'dog'}}")
            named = {column_name(key): value for key, value in row.items()}
            if len(named) < len(row):
                twice = Counter(map(column_name, row)).most_common(1)[0][0]
                raise UsageError(f"{place} names the key {twice!r} twice; rename one of them")
            yield place, named

    def _values(self) -> Iterator[tuple[str, object]]:
        for number, line in self._file.lines():
            if not line.strip():
                continue
            if number == 1 and self.path.suffix.lower() == ".json" and line.lstrip().startswith("["):
                whole = parsed(self._file.text(), str(self.path))
                yield from ((f"entry {at} of {self.path}", row) for at, row in enumerate(_as_list(whole), start=1))
                return
            place = f"line {number} of {self.path}"
            yield place, parsed(line, place)

    def plain_blocks(self) -> Iterator[Block]:
        """The rows that `rows` gives, many at a time, with all keys of a block in their order; None for one that a row
        lacks. Raises NotPlainError where it cannot be told so fast that they are the same.
        """
        for number, lines in self._file.plain_blocks():
            there = [index for index, line in enumerate(lines) if line.strip()]
            try:
                found = [SCAN(lines[index], 0) for index in there]
            except (ValueError, RecursionError) as error:
                raise NotPlainError(str(error)) from error
            if any(lines[index][end:].strip(" \t") for index, (_, end) in zip(there, found, strict=True)):
                raise NotPlainError("text behind an object")
            rows = [row for row, _ in found]
            if not set(map(type, rows)) <= {dict}:
                raise NotPlainError("not an object")
            keys = list(dict.fromkeys(chain.from_iterable(rows)))
            if len(set(map(column_name, keys))) < len(keys) or len(keys) * len(rows) > BLOCK_CELLS:
                raise NotPlainError("two keys of one name, or more cells than text")
            if rows:
                columns = {column_name(key): [row.get(key) for row in rows] for key in keys}
                yield Block(np.arange(number, number + len(lines))[there], columns)


def _as_list(value: object) -> list:
    assert isinstance(value, list), "JSON that begins with [ is a list"
    return value


def is_csv(path: Path) -> bool:
    """Whether a file is read as CSV: whatever is not called JSON lines."""
    return path.suffix.lower() not in (*JSONL_SUFFIXES, ".json")


def columns_of(path: Path) -> tuple[str, ...]:
    """The names of a table's columns as they are compared, empty for what is no table."""
    try:
        if is_csv(path):
            return Table(path).names
        return next((tuple(row) for _, row in JsonLines(path).rows()), ())
    except UsageError:
        return ()


def described_columns(path: Path) -> str:
    """The columns of a table as they are written, for a message."""
    try:
        return Table(path).described() if is_csv(path) else ", ".join(columns_of(path))[:COLUMNS_CHARACTERS]
    except UsageError as error:
        return str(error)


def text_lines(path: Path, said: list[str] | None = None) -> Iterator[str]:
    """The lines of a text file that are not empty; notes on how it was read are appended to `said`."""
    file = TextFile(path, "text")
    if said is not None:
        said += file.notes
    yield from (line.strip() for _, line in file.lines() if line.strip())


def whole_json(path: Path) -> object:
    return parsed(TextFile(path, "JSON").text(), str(path))


def parsed(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON: {error}") from error
