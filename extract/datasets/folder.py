"""A folder per class: ROOT/CLASS/FILE, with folders of splits, folds or containers such as audio/ around or below them.

Audio files right under ROOT, or under such folders alone, make an unlabelled dataset.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.audio.decode import SUFFIXES
from whisper_at_cli.extract.cells import from_one
from whisper_at_cli.extract.datasets.base import Clip, Dataset, as_text, unique_ids
from whisper_at_cli.extract.datasets.beside import Found, tables_around
from whisper_at_cli.extract.datasets.scan import all_files, is_audio, left_out
from whisper_at_cli.extract.datasets.splits import CONTAINERS, SPLITS
from whisper_at_cli.extract.errors import UsageError

LAYOUT = "a folder per class with audio files in it"
FOLD_FOLDER = re.compile(r"fold[-_ ]?([0-9]{1,4})", re.IGNORECASE)


def recognise(root: Path) -> bool:
    return root.is_dir()


def read(root: Path) -> Dataset:
    """Every audio file below `root`, sorted by path; the folder it lies in (below the split's) is its class."""
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; give a folder per class")
    found = sorted(all_files(root))
    paths = [path for path in found if is_audio(path[path.rfind("/") + 1 :])]
    said = left_out(found)
    if not paths:
        more = f" ({said[0]})" if said else ""
        raise UsageError(f"{root} holds no audio files ({', '.join(sorted(SUFFIXES)[:6])}, ...); give {LAYOUT}{more}")
    folders = _Folders([list(Path(path).parts[:-1]) for path in paths])
    classes = [normalize("NFC", as_text("/".join(parts))) for parts in folders.classes]
    if any(classes) and not all(classes):
        stray = paths[classes.index("")]
        raise UsageError(
            f"{root} holds class folders and also {stray} outside of them; move it into its class's folder"
        )
    names = sorted(set(classes) - {""})
    index = {name: at for at, name in enumerate(names)}
    folds, folds_said = from_one(folders.folds)
    clips = tuple(
        Clip(id=name, path=path, labels=(index[label],) if label else (), fold=fold, split=split)
        for name, path, fold, split, label in zip(unique_ids(paths), paths, folds, folders.splits, classes, strict=True)
    )
    said = [*folders.said(names), *folds_said, *said, *tables_around(root).unread_notes(by_request=True)]
    return Dataset(root.resolve().name, root, clips, tuple(names), notes=tuple(said))


def read_as_last_resort(root: Path) -> Dataset:
    """`read`, where nothing else fits.

    Raises UsageError where a table that lists the audio cannot be read, and folders do not say what is in it.
    """
    try:
        dataset = read(root)
    except UsageError:
        _refuse_unread_table(root)
        raise
    if len(dataset.class_names) < 2:
        _refuse_unread_table(root)
    return dataset


def _refuse_unread_table(root: Path) -> None:
    found: Found = tables_around(root)
    unread = next((table for table in found.unread if table in found.listing), None)
    if unread is not None:
        raise UsageError(
            f"{unread} lists the audio of {root} and was not read: {found.unread[unread]}. Correct it, or use --format "
            "folder to extract without it"
        )


class _Folders:
    """What the folders of each file are: its class, and its fold and split where all files have one."""

    def __init__(self, parts: list[list[str]]):
        self.classes = parts  # what is left of the folders
        self.folds: list[int | None] = [None] * len(parts)
        self.splits = [""] * len(parts)
        self.roles: list[str] = []
        while self._take(0) or self._take(-1):
            pass

    def _take(self, at: int) -> bool:
        """Take away the first or last folder of all files, if it is no class; whether it was none."""
        if not all(self.classes) or (at == -1 and min(map(len, self.classes)) < 2):
            return False
        heads = [parts[at] for parts in self.classes]
        role = self._role(heads, at)
        if role is None:
            return False
        self.roles.append(f"{role} {notes.listed(sorted(set(heads)))}")
        for parts in self.classes:
            parts.pop(at)
        return True

    def _role(self, heads: list[str], at: int) -> str | None:
        def all_are(known: Callable[[str], object]) -> bool:
            return all(known(name) for name in set(heads))

        if not any(self.splits) and all_are(lambda name: name.lower() in SPLITS):
            self.splits = [SPLITS[name.lower()] for name in heads]
            return "split"
        if not any(fold is not None for fold in self.folds) and all_are(lambda name: fold_of_folder(name) is not None):
            self.folds = [fold_of_folder(name) for name in heads]
            return "fold"
        if len(set(heads)) > 1:
            return None
        if heads[0].lower() in CONTAINERS:
            return "container"
        return "wrapper" if at == 0 and min(map(len, self.classes)) > 1 else None

    def said(self, names: list[str]) -> list[str]:
        classes = "1 class" if len(names) == 1 else f"{len(names)} classes"
        said = [notes.FOLDER_CLASSES(classes=classes, names=notes.listed(names, most=10))] if names else []
        if self.roles:
            said.append(notes.FOLDER_ROLES(roles="; ".join(self.roles)))
        doubtful = [name for name in names if any(_looks_like_no_class(part) for part in name.split("/"))]
        if doubtful:
            said.append(notes.FOLDER_DOUBT(names=notes.listed(doubtful)))
        return said


def _looks_like_no_class(name: str) -> bool:
    known = name.lower() in SPLITS or name.lower() in CONTAINERS or name.startswith("_")
    return known or fold_of_folder(name) is not None


def fold_of_folder(name: str) -> int | None:
    """The fold that a folder's name says: `fold_3`, `Fold 3`, `fold03`."""
    match = FOLD_FOLDER.fullmatch(name)
    return int(match[1]) if match else None
