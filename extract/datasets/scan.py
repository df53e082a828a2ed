"""Which files lie below a folder: one pass over it, links to folders followed, each folder once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.audio.decode import SUFFIXES
from whisper_at_cli.extract.errors import UsageError

# Of files that lie beside audio and are none: documents, tables, pictures, annotations, features, programs.
OTHER_SUFFIXES = frozenset(
    ".txt .md .rst .pdf .doc .docx .odt .html .htm .tex .bib .csv .tsv .xls .xlsx .ods .json .jsonl .ndjson .xml .yaml "
    ".yml .toml .ini .cfg .log .png .jpg .jpeg .gif .bmp .svg .webp .tif .tiff .lab .textgrid .eaf .svl .ctm .stm .trn "
    ".rttm .srt .vtt .lrc .npy .npz .pt .pth .pkl .h5 .hdf5 .mat .arrow .parquet .py .ipynb .sh .r .m .asd .sfk "
    ".reapeaks .pek .cue .m3u .m3u8 .pls .sha256 .sha1 .md5 .lock .db .ini .bak .tmp .gitignore".split()
)


MOST_WRAPPERS = 5  # folders in folders
ABOUT = ("readme", "license", "licence", "copying", "changelog", "citation", "attribution")  # files about a dataset


def audio_files(root: Path) -> Iterator[str]:
    """Paths relative to `root`, in the order of their folders and names. Hidden files and folders are left out.

    A folder that is named as an audio file is listed as one if no audio lies in it: whoever reads it says what it is.
    """
    return (path for path in all_files(root) if is_audio(path[path.rfind("/") + 1 :]))


def all_files(root: Path) -> Iterator[str]:
    """`audio_files`, and all others too."""
    try:
        yield from _below(str(root), "", set())
    except (OSError, RecursionError) as error:
        raise UsageError(f"{root} cannot be searched: {error}") from error


def _below(folder: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    status = Path(folder).stat()
    if (status.st_dev, status.st_ino) in seen:
        return  # a link to where we have been
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        listed = sorted((entry.name, is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    for name, folder_too in listed:
        if not folder_too:
            yield prefix + name
            continue
        found = False
        for path in _below(f"{folder}/{name}", f"{prefix}{name}/", seen):
            found = found or is_audio(path[path.rfind("/") + 1 :])
            yield path
        if is_audio(name) and not found:
            yield prefix + name


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: whoever reads it says so
        return False


def is_audio(name: str) -> bool:
    """Whether a file's name ends as those of audio files do."""
    dot = name.rfind(".")
    return dot > 0 and name[dot:].lower() in SUFFIXES


def left_out(paths: list[str]) -> list[str]:
    """A note on the files of a folder that are neither audio by their suffix nor known to be something else."""
    found = Counter(
        suffix for path in paths
        if (suffix := PurePosixPath(path).suffix.lower()) and suffix not in OTHER_SUFFIXES and suffix not in SUFFIXES
    )  # fmt: skip
    if not found:
        return []
    suffixes = [suffix for suffix, _ in found.most_common()]
    return [notes.LEFT_OUT(files=sum(found.values()), suffixes=notes.listed(suffixes, most=20))]


def folders_of(path: Path) -> list[Path]:
    """The folders in a folder, sorted; none where it cannot be read."""
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.name[:1] not in "._")
    except OSError:  # a file, or what may not be read: its reader says so
        return []


def unwrapped(root: Path, *others: str) -> Path:
    """Where the files of a folder begin: below folders that hold nothing but one folder, and no file with a suffix of
    audio or one of these others."""
    for _ in range(MOST_WRAPPERS):
        try:
            with os.scandir(root) as entries:
                listed = [entry for entry in entries if entry.name[:1] not in "._"]
        except OSError:
            return root
        folders = [entry.name for entry in listed if is_folder(entry)]
        files = [entry.name.lower() for entry in listed if entry.name not in folders]
        if len(folders) != 1 or any(is_audio(name) or _is_other(name, others) for name in files):
            return root
        root = root / folders[0]
    return root


def _is_other(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.endswith(suffixes) and not name.startswith(ABOUT)


def first_file(root: Path, *names: str) -> Path | None:
    """The first of these files that is there."""
    return next((path for name in names if (path := root / name).is_file()), None)
