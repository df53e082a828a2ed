"""The tables that lie beside a folder's audio: which of them say what its clips are, and why the others do not.

`manifest.csv` is read whatever it says. AudioFolder's `metadata.csv`, at the top or in the folder of each split, and
any other table at the top or in a folder such as `meta/`, is read if it has a column of audio files and one of labels
and lists at least half of the audio below. A table that says no more than the folders' names is not needed.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.datasets.columns import AUDIO_NAMES, LABEL_NAMES
from whisper_at_cli.extract.datasets.entries import read_rows, rebased
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.datasets.rows import Rows
from whisper_at_cli.extract.datasets.scan import audio_files, first_file, is_folder
from whisper_at_cli.extract.datasets.splits import SPLITS
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import CSV_SUFFIXES, JSONL_SUFFIXES, TextFile, columns_of, described_columns

MANIFESTS = ("manifest.csv", "manifest.jsonl", "manifest.tsv")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.tsv")
FOLDERS = frozenset("meta metadata label labels annotation annotations csv list lists split splits info tables".split())
MOST_TABLES = 30  # that are looked into
LINES_LOOKED_AT = 20
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
            splits |= {table: SPLITS[name] for table in usable if (name := table.stem.lower()) in SPLITS}
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
    unread = {table: reason for table in tables if (reason := _unread(table, root, audio))}
    usable = tuple(table for table in tables if table not in unread)
    listing = frozenset(table for table in unread if _lists_audio(table, stems))
    return Found(root, usable, splits, unread, listing, audio)


def _candidates(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """Tables at the top and in folders of tables; and AudioFolder's in folders of splits, with these splits."""
    suffixes = CSV_SUFFIXES + JSONL_SUFFIXES
    tables, splits = [], {}
    try:
        with os.scandir(root) as entries:
            listed = sorted((entry.name, is_folder(entry)) for entry in entries if not entry.name.startswith("."))
        for name, folder in listed:
            if folder and name.lower() in SPLITS and (table := first_file(root / name, *METADATA)):
                tables.append(table)
                splits[table] = SPLITS[name.lower()]
            elif folder and name.lower() in FOLDERS:
                tables += sorted(file for file in (root / name).iterdir() if file.suffix.lower() in suffixes)
            elif not folder and name.lower().endswith(suffixes):
                tables.append(root / name)
    except OSError as error:
        raise UsageError(f"{root} cannot be searched: {error}") from error
    return tables[:MOST_TABLES], splits


def _unread(table: Path, root: Path, audio: tuple[str, ...]) -> str:
    """Why a table does not say what the clips are; nothing if it does."""
    names = columns_of(table)
    columns = f"(its columns are {described_columns(table)})"
    if set(AUDIO_NAMES).isdisjoint(names):
        return f"it has no column of audio files {columns}"
    if set(LABEL_NAMES).isdisjoint(names):
        return f"it has no column of labels {columns}"
    try:
        _, rows = rebased(read_rows(table, []), table, root, may_move=False)
    except UsageError as error:
        return str(error)
    paths, _ = located(root, rows.audio)
    there = set(audio).intersection(map(posixpath.normpath, paths))
    if 2 * len(there) < len(audio) and not (table.name in METADATA and there):
        return f"it lists {len(there)} of {len(audio)} audio files"
    if _says_what_folders_say(rows, paths):
        return "its labels are the names of the folders"
    return ""


def _says_what_folders_say(rows: Rows, paths: np.ndarray) -> bool:
    if any((column != "").any() for column in (rows.split, rows.id, rows.text)) or (rows.fold >= 0).any():
        return False
    if (np.nan_to_num(rows.start) > 0).any() or (np.nan_to_num(rows.end) > 0).any() or (rows.counts != 1).any():
        return False
    return all(
        rows.names[label] == PurePosixPath(path).parent.name for label, path in zip(rows.labels, paths, strict=True)
    )


def _lists_audio(table: Path, stems: set[str]) -> bool:
    """Whether the first lines of a table hold the name of an audio file, or what such a name begins with."""
    try:
        lines = [line for _, (_, line) in zip(range(LINES_LOOKED_AT), TextFile(table, "CSV").lines(), strict=False)]
    except UsageError:
        return False
    texts = re.split(r"[,;\t\r\n]", "\n".join(lines))
    cells = {PurePosixPath(text.strip().strip("\"'").replace("\\", "/")) for text in texts}
    names = {cell.stem for cell in cells} | {cell.name for cell in cells}
    long = tuple(name for name in names if len(name) >= FEWEST_CHARACTERS)
    return not names.isdisjoint(stems) or bool(long and any(stem.startswith(long) for stem in stems))
