"""The tables that lie beside a folder's audio: which of them say what its clips are, and why the others do not.

`manifest.csv` is read whatever it says. AudioFolder's `metadata.csv`, at the top or in the folder of each split, and
any other table at the top or in a folder such as `meta/` or `data/`, is read if it has a column of audio files and one
of labels and lists at least half of the audio below. Where none does, tables that are called as splits are
(`train.csv`), if half of what they list is there. A table that says no more than the folders' names is not needed.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.datasets.columns import AUDIO_NAMES, LABEL_NAMES, OTHERS
from whisper_at_cli.extract.datasets.entries import read_rows, rebased
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.datasets.rows import Rows
from whisper_at_cli.extract.datasets.scan import audio_files, first_file, is_folder, unwrapped
from whisper_at_cli.extract.datasets.splits import CONTAINERS, SPLITS, TABLES, split_of
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import CSV_SUFFIXES, JSONL_SUFFIXES, TextFile, columns_of, described_columns

MANIFESTS = ("manifest.csv", "manifest.jsonl", "manifest.tsv")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.tsv")
MOST_TABLES = 30  # that are looked into
CSV_OR_JSONL = CSV_SUFFIXES + JSONL_SUFFIXES
LISTS = (".txt", ".lst", ".json")  # tables too, if half of their first lines name audio
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
SUFFIXES = CSV_OR_JSONL + LISTS + SPREADSHEETS
LINES_LOOKED_AT = 20
NO_LABELS = frozenset(  # columns that tables of speech have
    "sentence transcription transcript normalized_text client_id speaker speaker_id duration sampling_rate sample_rate "
    "gender age accent accents locale segment variant up_votes down_votes sentence_id sentence_domain language".split()
)
FEWEST_CHARACTERS = 8  # of a cell with which the name of an audio file may begin


@dataclass(frozen=True)
class Found:
    """The tables of a dataset under one root."""

    root: Path
    usable: tuple[Path, ...]
    splits: dict[Path, str] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)  # and why
    listing: frozenset[Path] = frozenset()  # those of the unread that list audio that is there
    audio: tuple[str, ...] = ()  # below the root, where tables were searched for

    @property
    def searched(self) -> bool:
        """Whether the tables were found by what is in them."""
        return bool(self.audio)

    def chosen(self) -> Found:
        """The tables to be read: one, or one for each split. Raises UsageError where several do not go together."""
        usable, splits = self.usable, dict(self.splits)
        if len(usable) > 1:
            usable = tuple(table for table in usable if table.name in METADATA) or usable
            splits |= {table: split for table in usable if (split := split_of(table.stem))}
        if len(usable) > 1 and not all(table in splits for table in usable):
            names = ", ".join(table.relative_to(self.root).as_posix() for table in usable)
            raise UsageError(
                f"{self.root} holds several tables of its audio ({names}); give the one to read as DATASET"
            )
        return replace(self, usable=usable, splits=splits)

    def said(self, paths: Iterable[str]) -> list[str]:
        """Notes on a dataset of clips with these paths that was read from the tables."""
        if not self.searched:
            return []
        clips = set(map(posixpath.normpath, paths))
        names = notes.listed([table.relative_to(self.root).as_posix() for table in self.usable])
        said = [notes.TABLE_FOUND(table=names)]
        if len(self.usable) > 1:
            said.append(notes.TABLES_JOINED(count=len(self.usable), tables=names))
        if unlisted := [path for path in self.audio if path not in clips]:
            said.append(notes.UNLISTED(files=len(unlisted), table=names, names=notes.listed(unlisted)))
        return said + self.unread_notes()

    def unread_notes(self, *, by_request: bool = False) -> list[str]:
        """Notes on the tables that are not read; `by_request` none is."""
        unread = self.unread | (dict.fromkeys(self.usable, "--format folder was given") if by_request else {})
        return [
            notes.TABLE_UNREAD(table=table.relative_to(self.root).as_posix(), reason=reason)
            for table, reason in unread.items()
        ]


def find_tables(root: Path) -> Found:
    """The tables that say what a folder's clips are, and those that do not."""
    named = first_file(root, *MANIFESTS)
    if named is not None and not set(AUDIO_NAMES).isdisjoint(columns_of(named)):
        return Found(root, (named,))
    tables, splits = _candidates(root)
    if not tables:
        return Found(root, ())
    audio = tuple(audio_files(root))
    stems = {PurePosixPath(path).stem for path in audio}
    looks = {table: _look(table, root, audio) for table in tables}
    usable = tuple(table for table, look in looks.items() if not look.problem)
    if all(split_of(table.stem) for table in usable):
        usable = tuple(
            table for table, look in looks.items() if not look.problem or (look.mostly_there and split_of(table.stem))
        )
    unread = {table: look.problem for table, look in looks.items() if table not in usable}
    listing = frozenset(table for table in unread if _lists_audio(table, stems))
    unread = {table: why for table, why in unread.items() if table in listing or table.suffix.lower() not in LISTS}
    return Found(root, usable, splits, unread, listing, audio)


def below_wrappers(root: Path) -> Path:
    """Where a dataset begins: below folders in which there is neither audio nor a table, and one folder alone."""
    return unwrapped(root, *SUFFIXES)


def tables_around(root: Path) -> Found:
    """`find_tables` at a folder, or below its wrappers where there are none."""
    found = find_tables(root)
    return found if found.usable or found.unread else find_tables(below_wrappers(root))


def _candidates(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """Tables at the top and in folders of tables; and AudioFolder's in folders of splits, with these splits."""
    tables, splits = [], {}
    try:
        with os.scandir(root) as entries:
            listed = sorted((entry.name, is_folder(entry)) for entry in entries if not entry.name.startswith("."))
        for name, folder in listed:
            if folder and name.lower() in SPLITS and (table := first_file(root / name, *METADATA)):
                tables.append(table)
                splits[table] = SPLITS[name.lower()]
            elif folder and name.lower() in TABLES | CONTAINERS:
                tables += sorted(file for file in (root / name).iterdir() if file.name.lower().endswith(SUFFIXES))
            elif not folder and name.lower().endswith(SUFFIXES):
                tables.append(root / name)
    except OSError as error:
        raise UsageError(f"{root} cannot be searched: {error}") from error
    return tables[:MOST_TABLES], splits


class _Look(NamedTuple):
    """Why a table does not say what the clips are, nothing if it does; and whether half of what it lists is there."""

    problem: str
    mostly_there: bool = False


def _columns_problem(table: Path, audio: tuple[str, ...]) -> str:
    """Why a table's columns do not say what the clips are. One without labels does where there is nothing to say:
    none of its columns could be the labels, and no folders could."""
    if table.suffix.lower() in SPREADSHEETS:
        return "it is a spreadsheet; save it as CSV"
    names = set(columns_of(table))
    columns = f"(its columns are {described_columns(table)})"
    if names.isdisjoint(AUDIO_NAMES):
        return f"it has no column of audio files {columns}"
    if names.isdisjoint(LABEL_NAMES) and (names - NO_LABELS.union(AUDIO_NAMES, OTHERS) or _may_be_classes(audio)):
        return f"it has no column of labels {columns}"
    return ""


def _may_be_classes(audio: tuple[str, ...]) -> bool:
    """Whether audio lies in folders of several names that are not those of splits or containers."""
    names = {PurePosixPath(path).parent.name.lower() for path in audio}
    return len(names - CONTAINERS - SPLITS.keys()) > 1


def _look(table: Path, root: Path, audio: tuple[str, ...]) -> _Look:
    if problem := _columns_problem(table, audio):
        return _Look(problem)
    try:
        _, rows = rebased(read_rows(table, []), table, root, may_move=False)
    except UsageError as error:
        return _Look(str(error))
    paths, _ = located(root, rows.audio)
    there = set(audio).intersection(map(posixpath.normpath, paths))
    if 2 * len(there) < len(audio) and not (table.name in METADATA and there):
        return _Look(f"it lists {len(there)} of {len(audio)} audio files", 2 * len(there) >= len(rows))
    if _says_what_folders_say(rows, paths):
        return _Look("its labels are the names of the folders")
    return _Look("")


def _says_what_folders_say(rows: Rows, paths: np.ndarray) -> bool:
    if any((column != "").any() for column in (rows.split, rows.id, rows.text)) or (rows.fold >= 0).any():
        return False
    if (np.nan_to_num(rows.start) > 0).any() or (np.nan_to_num(rows.end) > 0).any() or (rows.counts != 1).any():
        return False
    return all(
        rows.names[label] == PurePosixPath(path).parent.name for label, path in zip(rows.labels, paths, strict=True)
    )


def _lists_audio(table: Path, stems: set[str]) -> bool:
    """Whether the first lines of a table hold the name of an audio file, or what such a name begins with; of a text
    file at least every second line."""
    try:
        lines = [line for _, (_, line) in zip(range(LINES_LOOKED_AT), TextFile(table, "CSV").lines(), strict=False)]
    except UsageError:
        return False
    naming = [_names_audio(line, stems) for line in lines if line.strip(" \t\r\n[]{}")]
    return any(naming) if table.suffix.lower() not in LISTS else 2 * sum(naming) > len(naming)


def _names_audio(line: str, stems: set[str]) -> bool:
    texts = re.split(r"[,;|\t\r\n\[\]{}\"]|: ", line) + line.split()
    cells = {PurePosixPath(text.strip().strip("\"'").replace("\\", "/")) for text in texts}
    names = {cell.stem for cell in cells} | {cell.name for cell in cells}
    long = tuple(name for name in names if len(name) >= FEWEST_CHARACTERS)
    return not names.isdisjoint(stems) or bool(long and any(stem.startswith(long) for stem in stems))
