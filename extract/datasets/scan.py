"""Which audio files lie below a folder: one pass over it, links to folders followed, each folder once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from whisper_at_cli.extract.audio.decode import SUFFIXES
from whisper_at_cli.extract.errors import UsageError


def audio_files(root: Path) -> Iterator[str]:
    """Paths relative to `root`, in the order of their folders and names. Hidden files and folders are left out.

    A folder that is named as an audio file is listed as one if no audio lies in it: whoever reads it says what it is.
    """
    try:
        yield from _below(str(root), "", set())
    except (OSError, RecursionError) as error:
        raise UsageError(f"{root} cannot be searched: {error}") from error


def _below(folder: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return  # a link to where we have been
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        listed = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in listed:
        audio = is_audio(name)
        if not is_folder:
            if audio:
                yield prefix + name
            continue
        found = False
        for path in _below(f"{folder}/{name}", f"{prefix}{name}/", seen):
            found = True
            yield path
        if audio and not found:
            yield prefix + name


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: whoever reads it says so
        return False


def is_audio(name: str) -> bool:
    """Whether a file's name ends as those of audio files do."""
    dot = name.rfind(".")
    return dot > 0 and name[dot:].lower() in SUFFIXES


def first_file(root: Path, *names: str) -> Path | None:
    """The first of these files that is there."""
    return next((path for name in names if (path := root / name).is_file()), None)
