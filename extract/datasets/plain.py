"""Many rows of a table at a time, where they are plain: the same values as `entry_of` gives row by row.

What is not plain raises an error, and is then read row by row, which says what is wrong if anything is.
tests/test_rows.py holds the two ways to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from whisper_at_cli.extract.cells import NAME_CHARACTERS, NANS, PATH_CHARACTERS, as_fold, as_seconds
from whisper_at_cli.extract.datasets.columns import LABEL_NAMES, OTHERS, Columns, columns_of_keys
from whisper_at_cli.extract.datasets.entries import SEPARATOR, TEXT_CHARACTERS, entry_of, is_list, labels_of
from whisper_at_cli.extract.datasets.rows import (
    NAN_LABEL,
    Part,
    RowsBuilder,
    each_once,
    fold_column,
    label_columns,
    seconds_column,
)
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import Block, JsonLines, NotPlainError, Table
from whisper_at_cli.extract.texts import text_column


def plain_builder(table: Table | JsonLines, columns: Columns | None) -> tuple[RowsBuilder, Columns, list[str]] | None:
    """All rows of a table, the columns that were taken, and notes on these; None where it must be read row by row.

    The columns of JSON lines are known only at their end: give None.
    """
    try:
        return _all_rows(table, columns)
    except (NotPlainError, UsageError, OSError, ValueError):  # reading it row by row says what is wrong, if it is
        return None


def _all_rows(table: Table | JsonLines, columns: Columns | None) -> tuple[RowsBuilder, Columns, list[str]]:
    if columns is not None:
        return _builder(_csv_blocks(table, columns), columns, str(table.path)), columns, []
    assert isinstance(table, JsonLines)
    guessed, said = _guessed_columns(table), list[str]()
    keys: dict[str, None] = {}

    def blocks() -> Iterator[Block]:
        for block in table.plain_blocks():
            keys.update(dict.fromkeys(block.columns))
            yield block

    builder = _builder(blocks(), guessed, str(table.path))
    columns = columns_of_keys(table, keys, said)
    if columns != guessed:
        builder = _builder(table.plain_blocks(), columns, str(table.path))
    return builder, columns, said


def _guessed_columns(table: JsonLines) -> Columns:
    """The columns by the keys of the first rows."""
    first = next(table.plain_blocks(), None)
    return columns_of_keys(table, dict.fromkeys(first.columns if first else ()), [])


def _csv_blocks(table: Table | JsonLines, columns: Columns) -> Iterator[Block]:
    assert isinstance(table, Table)
    return table.plain_blocks({columns.audio, columns.label, *LABEL_NAMES, *OTHERS})


def _builder(blocks: Iterator[Block], columns: Columns, path: str) -> RowsBuilder:
    builder = RowsBuilder()
    labels = _Labels(builder, columns)
    for block in blocks:
        builder.lists = builder.lists or any(map(is_list, block.columns.get(columns.label, ())))
        try:
            builder.parts.append(_part(block, columns, labels))
        except (NotPlainError, UsageError, ValueError, OverflowError, TypeError):
            builder.parts.append(_part_by_rows(block, columns, builder, path))
    return builder


def _part_by_rows(block: Block, columns: Columns, builder: RowsBuilder, path: str) -> Part:
    names = list(block.columns)
    cells = zip(*block.columns.values(), strict=True)
    try:
        return builder.part_of(
            [
                entry_of(dict(zip(names, row, strict=True)), f"line {number} of {path}", columns)
                for number, row in zip(block.numbers.tolist(), cells, strict=True)
            ]
        )
    except UsageError as error:  # whether it is the first fault of the table is told row by row
        raise NotPlainError(str(error)) from error


def _part(block: Block, columns: Columns, labels: _Labels) -> Part:
    cells = block.columns
    audio = cells.get(columns.audio) or []
    start, end = (_seconds(cells.get(name) if columns.spans else None, name) for name in ("start", "end"))
    if end is not None and (end <= (0 if start is None else np.nan_to_num(start))).any():
        raise NotPlainError("an end before a start")
    without = labels.builder.without
    try:
        counts, numbers = labels.of(cells, len(audio))
        return Part(
            block.numbers, _audio(audio), counts, numbers, start, end, _folds(cells.get("fold")),
            _texts(cells.get("split"), 64), _texts(cells.get("id"), NAME_CHARACTERS),
            _texts(cells.get("text"), TEXT_CHARACTERS),
        )  # fmt: skip
    except Exception:
        labels.builder.without = without  # they are counted when the rows are read one by one
        raise


def _audio(cells: list) -> np.ndarray:
    """(rows,) text of files, of which none may be empty."""
    if set(map(type, cells)) != {str}:
        raise NotPlainError("not text")
    if not all(cells) or max(map(len, cells)) > PATH_CHARACTERS or not NANS.isdisjoint(map(str.strip, cells)):
        raise NotPlainError("no file, or a long name")
    return _column(cells, "\0")


def _texts(cells: list | None, most: int) -> np.ndarray | None:
    """(rows,) text of at most so many characters; None where nothing stands."""
    kinds = set(map(type, cells or ()))
    if not kinds or kinds == {type(None)}:
        return None
    texts = cells or []
    if type(None) in kinds:
        texts = ["" if cell is None else cell for cell in texts]
    if kinds - {type(None)} != {str} or max(map(len, texts)) > most:
        raise NotPlainError("not text, or a long one")
    texts = list(map(str.strip, texts))
    if not NANS.isdisjoint(texts):
        texts = ["" if text in NANS else text for text in texts]
    return _column(texts, "\0\n") if any(texts) else None


def _column(texts: list[str], unwanted: str) -> np.ndarray:
    """A column of text. Raises NotPlainError or UnicodeEncodeError for what cannot be stored."""
    together = "".join(texts)
    if any(character in together for character in unwanted):
        raise NotPlainError("a character that is not text")
    return text_column(texts)


def _seconds(cells: list | None, what: str) -> np.ndarray | None:
    """(rows,) float64, NaN where nothing is given; None where nothing is given in any."""
    kinds = set(map(type, cells or ()))
    if not cells or kinds == {type(None)}:
        return None
    if kinds != {str} and not kinds <= {int, float}:
        return seconds_column(as_seconds(cell, what, "") for cell in cells)
    try:
        column = np.fromiter(map(float, cells), dtype=np.float64, count=len(cells))
    except ValueError:  # an empty cell
        return seconds_column(as_seconds(cell, what, "") for cell in cells)
    if kinds == {str} and np.isnan(column).any():  # -nan is no empty cell
        return seconds_column(as_seconds(cell, what, "") for cell in cells)
    if not ((column >= 0) & (column < 1e9) | np.isnan(column)).all():
        raise NotPlainError("no seconds")
    return column


def _folds(cells: list | None) -> np.ndarray | None:
    """(rows,) int32, -1 for none; None where no row has one."""
    kinds = set(map(type, cells or ()))
    if not cells or kinds == {type(None)}:
        return None
    if not kinds <= {str, int, type(None)}:  # True is 1, and no fold; -0.0 is 0.0, and none either
        return fold_column([as_fold(cell, "") for cell in cells])
    fold_of = {cell: as_fold(cell, "") for cell in set(cells)}
    return fold_column([fold_of[cell] for cell in cells])


class _Labels:
    """Cells of labels to their numbers, which are remembered."""

    def __init__(self, builder: RowsBuilder, columns: Columns):
        self.builder, self.columns = builder, columns
        self.names = tuple(dict.fromkeys(name for name in (columns.label, *LABEL_NAMES) if name))
        self._numbers: dict[str, int] = {}  # of a label as it stands in a list; -1 for an empty one

    def of(self, cells: dict[str, list], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """How many labels each row has, (rows,) int64, and the numbers of all of them, int32."""
        there = [name for name in self.names if name in cells and _any_given(cells[name])]
        if there == ["labels"] and (found := self._lists(cells["labels"])):
            return found
        columns = [cells[name] for name in there]
        together = list(zip(*columns, strict=True)) if there else [()] * rows
        if not all(set(map(type, column)) <= {str, type(None)} for column in columns):  # 1 and True would be one key
            return label_columns([self.builder.numbers_of(self._names(there, row)) for row in together])
        names = {row: self._names(there, row) for row in dict.fromkeys(together)}
        numbers = {row: self.builder.numbers_of(names[row]) for row in names if names[row] != NAN_LABEL}
        self.builder.without += sum(row not in numbers for row in together) if len(numbers) < len(names) else 0
        return label_columns([numbers.get(row, ()) for row in together])

    def _names(self, there: list[str], row: tuple) -> tuple[str, ...]:
        return labels_of(dict(zip(there, row, strict=True)), "", self.columns)

    def _lists(self, cells: list) -> tuple[np.ndarray, np.ndarray] | None:
        """`of` for a column `labels` of lists, or of text with semicolons; None where a cell is anything else."""
        kinds = set(map(type, cells))
        if kinds <= {str, type(None)}:
            texts = [cell or "" for cell in cells]
            labels = SEPARATOR.join(texts).split(SEPARATOR)
            if "[" in {text[:1] for text in texts} or not NANS.isdisjoint(map(str.strip, set(labels))):
                return None
            counts = np.array([text.count(SEPARATOR) + 1 for text in texts])
        elif kinds <= {list, type(None)}:
            lists = [cell or [] for cell in cells]
            labels = list(chain.from_iterable(lists))
            counts = np.array(list(map(len, lists)), dtype=np.int64)
            if not set(map(type, labels)) <= {str}:
                return None
        else:
            return None
        for label in dict.fromkeys(labels):
            if label not in self._numbers:
                found = self._names(["labels"], ([label],))
                self._numbers[label] = self.builder.numbers_of(found)[0] if found else -1
        return each_once(counts, np.array([self._numbers[label] for label in labels], dtype=np.int32))


def _any_given(cells: list) -> bool:
    return any(cells) or any(cell not in (None, "", []) for cell in cells)
