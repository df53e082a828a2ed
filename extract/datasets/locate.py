"""Where the files lie that a table lists: as it says, else by their names, in whatever way the dataset was packed.

Names are compared in one Unicode form, with / between folders. What was adapted is in the notes; what cannot be found,
or could be several files, keeps the path that the table gives and is missing.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.datasets.scan import all_files, is_audio

CHECKED = 2000  # files of a table that are looked for where it says; if all are there, so are the others
FORM, SLASHES, CASE, SUFFIX, FOLDER = "Unicode form", "backslashes", "upper and lower case", "their suffix", "folder"


def located(root: Path, listed: Sequence[str], *, published: bool = False) -> tuple[list[str], list[str]]:
    """Paths relative to `root` of listed files, and notes.

    Of a `published` dataset all names are unique, so that the folder and the suffix may differ from those listed; of
    any other table one path must end as the other does.
    """
    if all(exists(root, listed[row]) for row in evenly(len(listed), CHECKED)):
        return list(listed), []
    files = _Files(root, published=published)
    found = [files.find(path) for path in listed]
    pairs = {(path, match.path) for path, match in zip(listed, found, strict=True) if match}
    claimed = Counter(place for _, place in pairs)  # by how many listed names
    paths: list[str] = []
    how: dict[str, list[tuple[str, str]]] = defaultdict(list)
    twice = []
    for path, match in zip(listed, found, strict=True):
        if match is None or (claimed[match.path] > 1 and match.how):
            paths.append(path)
            continue
        paths.append(match.path)
        for change in match.how:
            how[change].append((path, match.path))
        if match.others:
            twice.append(path)
    return paths, _notes(how, twice)


def exists(root: Path, path: str) -> bool:
    try:
        return (root / path).exists()
    except (OSError, ValueError):
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

    def __post_init__(self) -> None:
        for path in all_files(self.root):
            self.paths.add(path)
            for key in _keys(path):
                self.by_name[key].append(path)

    def find(self, listed: str) -> _Match | None:
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
            if change == SUFFIX and not self.published and is_audio(PurePosixPath(plain).name):
                break
            match = self._best(plain, self.by_name.get(key, []), change)
            if match:
                return _Match(match.path, how + match.how, match.others)
        return None

    def _best(self, listed: str, candidates: list[str], change: str) -> _Match | None:
        """The one candidate that lies where the listed path says, or least deep; None where several could be meant."""
        if change == SUFFIX:
            candidates = [path for path in candidates if is_audio(PurePosixPath(path).name)]
        wanted = _parts(listed)
        scored = []
        for path in candidates:
            parts = _parts(path)
            same = _common_tail(wanted, parts)
            if self.published or same == min(len(wanted), len(parts)):
                scored.append((-same, len(parts), path))
        scored.sort()
        if not scored or (len(scored) > 1 and scored[0][:2] == scored[1][:2]):
            return None
        path = scored[0][2]
        how: tuple[str, ...] = () if change == FORM and _name(path) == _name(listed) else (change,)
        how += () if wanted[:-1] == _parts(path)[:-1] else (FOLDER,)
        return _Match(path, how, others=len(scored) > 1)


def _name(path: str) -> str:
    return path[path.rfind("/") + 1 :]


def _keys(path: str) -> tuple[str, str, str]:
    """Names by which a file is known: in one Unicode form, in lower case, and without a suffix."""
    name = unicodedata.normalize("NFC", _name(path))
    lower = name.casefold()
    stem = PurePosixPath(lower).stem if is_audio(name) else lower
    return f"name {name}", f"lower {lower}", f"stem {stem}"


def _parts(path: str) -> tuple[str, ...]:
    """Folders and stem, as they are compared."""
    parts = unicodedata.normalize("NFC", path).casefold().split("/")
    return (*parts[:-1], PurePosixPath(parts[-1]).stem if is_audio(parts[-1]) else parts[-1])


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
