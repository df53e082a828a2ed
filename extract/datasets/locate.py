"""Where the files lie that a table lists: as it says, else by their names, in whatever way the dataset was packed.

Names are compared in one Unicode form, with / between folders. What was adapted is in the notes; what cannot be found,
or could be several files, keeps the path that the table gives and is missing.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.datasets.scan import all_files, is_audio

CHECKED = 2000  # files of a table that are looked for where it says; if all are there, so are the others
ROWS_AT_ONCE = 1 << 15
NAMES_SEARCHED, FOLDERS_SEARCHED = 100, 2000  # with more, files are looked for one by one
UNUSUAL = ("\\", " \n", "\n ", "/\n", "/.\n", "/..\n", *"\t\r\x0b\x0c\x1c\x1d\x1e\x1f")  # in lines of paths
FORM, SLASHES, CASE, SUFFIX, FOLDER = "Unicode form", "backslashes", "upper and lower case", "their suffix", "folder"


Listed = TypeVar("Listed", list[str], np.ndarray)


def located(root: Path, listed: Listed, *, published: bool = False) -> tuple[Listed, list[str]]:
    """Paths relative to `root` of listed files, a list or a column of text, and notes.

    Of a `published` dataset all names are unique, so that the folder and the suffix may differ from those listed; of
    any other table one path must end as the other does.
    """
    if all(exists(root, listed[row]) for row in evenly(len(listed), CHECKED)):
        return listed, []
    files = _Files(root, published=published)
    found: dict[int, _Match] = {}  # of rows whose file is not where the table says
    for first in range(0, len(listed), ROWS_AT_ONCE):
        paths = list(listed[first : first + ROWS_AT_ONCE])
        for row, path in enumerate(paths if not files.are_plainly_missing(paths) else ()):
            match = files.find(path)
            if match and match.path != path:
                found[first + row] = match
    if not found:
        return listed, []
    places = {match.path for match in found.values()}
    pairs = {(listed[row], match.path) for row, match in found.items()} | {
        (path, path) for path in listed if path in places
    }
    claimed = Counter(place for _, place in pairs)  # by how many listed names
    located = listed.copy()
    how: dict[str, list[tuple[str, str]]] = defaultdict(list)
    twice = []
    for row, match in found.items():
        if claimed[match.path] > 1 and match.how:
            continue
        located[row] = match.path
        for change in match.how:
            how[change].append((listed[row], match.path))
        if match.others:
            twice.append(listed[row])
    return located, _notes(how, twice)


def exists(root: Path, path: str) -> bool:
    try:
        return os.path.exists(os.path.join(root, path))  # noqa: PTH110, PTH118 - a Path takes ten times as long
    except ValueError:
        return False


def evenly(count: int, most: int) -> list[int]:
    """At most so many row numbers, evenly spread."""
    if count <= most:
        return list(range(count))
    return [row * (count - 1) // (most - 1) for row in range(most)]


@dataclass(frozen=True, slots=True)
class _Match:
    path: str
    how: tuple[str, ...] = ()  # what had to be adapted
    others: bool = False  # whether deeper files have that name too


@dataclass
class _Files:
    """The files below a folder, by their names."""

    root: Path
    published: bool
    paths: set[str] = field(default_factory=set)
    by_name: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _known: dict[str, tuple[str, ...]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)  # in lower case, with and without what follows the last dot

    def __post_init__(self) -> None:
        for path in all_files(self.root):
            self.paths.add(path)
            keys = _keys(path)
            for key in keys:
                self.by_name[key].append(path)
            self.names.update(_with_and_without_suffix(keys[1].removeprefix("lower ")))

    def find(self, listed: str) -> _Match | None:
        """The file that is meant, which may be just where the table says; None where there is none."""
        if listed in self.paths or (listed and exists(self.root, listed)):
            return _Match(listed)
        plain = listed.strip()
        how: tuple[str, ...] = ()
        if "\\" in plain:
            plain, how = plain.replace("\\", "/"), (SLASHES,)
        plain = os.path.normpath(plain) if plain else plain
        if plain.startswith(("/", "..")) or not plain:
            return None
        if plain in self.paths:
            return _Match(plain, how)
        for key, change in zip(_keys(plain), (FORM, CASE, SUFFIX), strict=True):
            if change == SUFFIX and not self.published and is_audio(_name(plain)):
                break
            match = self._best(plain, self.by_name.get(key, []), change)
            if match:
                return _Match(match.path, how + match.how, match.others)
        return None

    def are_plainly_missing(self, listed: list[str]) -> bool:
        """Whether `find` would give None for all of these, where that is soon told: no such folder or name is there."""
        together = "\n" + "\n".join(listed).lower() + "\n"
        if not together.isascii() or any(part in together for part in UNUSUAL) or len(self.names) > NAMES_SEARCHED:
            return False
        if any(f"/{name}{end}" in together for name in self.names for end in ".\n"):
            return False
        folders = {path.rpartition("/")[0] for path in listed}
        return len(folders) <= FOLDERS_SEARCHED and not any(exists(self.root, folder) for folder in folders)

    def _parts_of(self, path: str) -> tuple[str, ...]:
        """`_parts` of a file that is there."""
        parts = self._known.get(path)
        if parts is None:
            parts = self._known[path] = _parts(path)
        return parts

    def _best(self, listed: str, candidates: list[str], change: str) -> _Match | None:
        """The one candidate that lies where the listed path says, or least deep; None where several could be meant."""
        if change == SUFFIX:
            candidates = [path for path in candidates if is_audio(_name(path))]
        wanted = _parts(listed)
        scored = []
        for path in candidates:
            parts = self._parts_of(path)
            same = _common_tail(wanted, parts)
            if self.published or same == min(len(wanted), len(parts)):
                scored.append((-same, len(parts), path))
        scored.sort()
        if not scored or (len(scored) > 1 and scored[0][:2] == scored[1][:2]):
            return None
        path = scored[0][2]
        how: tuple[str, ...] = () if change == FORM and _name(path) == _name(listed) else (change,)
        how += () if wanted[:-1] == self._parts_of(path)[:-1] else (FOLDER,)
        return _Match(path, how, others=len(scored) > 1)


def _name(path: str) -> str:
    return path[path.rfind("/") + 1 :]


def _keys(path: str) -> tuple[str, str, str]:
    """Names by which a file is known: in one Unicode form, in lower case, and without a suffix."""
    name = unicodedata.normalize("NFC", _name(path))
    lower = name.casefold()
    stem = lower[: lower.rfind(".")] if is_audio(name) else lower
    return f"name {name}", f"lower {lower}", f"stem {stem}"


def _with_and_without_suffix(name: str) -> tuple[str, str]:
    dot = name.rfind(".")
    return name, name[:dot] if dot > 0 else name


def _parts(path: str) -> tuple[str, ...]:
    """Folders and stem, as they are compared."""
    parts = unicodedata.normalize("NFC", path).casefold().split("/")
    last = parts[-1]
    return (*parts[:-1], last[: last.rfind(".")] if is_audio(last) else last)


def _common_tail(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    same = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        same += 1
    return same


def _notes(how: dict[str, list[tuple[str, str]]], twice: list[str]) -> list[str]:
    said = []
    for change, pairs in how.items():
        listed, found = pairs[0]
        if change == FOLDER:
            said.append(notes.RELOCATED(count=len(pairs), listed=listed, found=found))
        else:
            said.append(notes.NAMES_ADAPTED(count=len(pairs), how=change, listed=listed, found=found))
    if twice:
        said.append(notes.SAME_NAME(count=len(twice), names=notes.listed(twice)))
    return said
