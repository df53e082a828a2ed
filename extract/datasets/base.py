"""What every dataset reader returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.audio.decode import as_float
from whisper_at_cli.extract.audio.sources import ClipSource, FileClip
from whisper_at_cli.extract.cache.schema import ClipTable
from whisper_at_cli.extract.errors import UsageError


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of a dataset."""

    id: str  # unique
    path: str  # relative to the dataset's root, or absolute
    labels: tuple[int, ...] = ()  # indices into the dataset's class names
    fold: int = 0  # official fold from 1, 0 where there is none
    split: str = ""  # train, valid, test, eval, or empty
    start: float | None = None  # seconds into the file; None is its beginning
    end: float | None = None  # None is the clip's length after the start, or the file's end


@dataclass(frozen=True)
class Dataset:
    """A named list of clips under one root folder. What a subclass reads its audio from need not be files."""

    name: str
    root: Path
    clips: tuple[Clip, ...]
    class_names: tuple[str, ...] = ()
    clip_seconds: float = 10.0  # the length its clips are cut or padded to, unless the user asks for another
    notes: tuple[str, ...] = field(default=())  # what a user should know of how it was read
    texts: tuple[str, ...] = ()  # what is said in each clip, where a manifest tells
    missing_expected: bool = False  # a dataset of which nobody has every file
    source_rows: tuple[int, ...] = ()  # of a part: which rows of the whole it holds

    of_files = True  # each clip is a file, or a part of one

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def place(self) -> str:
        """Where it lies, for the record."""
        return str(self.root.resolve())

    def absolute(self) -> Dataset:
        """The same for processes that have another working folder."""
        return replace(self, root=self.root.resolve())

    def audio_path(self, clip: Clip) -> Path:
        return self.root / clip.path

    def is_there(self, row: int) -> bool:
        """Whether the file of a clip exists. What is in it shows when it is read."""
        try:
            return self.audio_path(self.clips[row]).exists()
        except (OSError, ValueError):
            return True  # a name that cannot be a file's: reading it says so

    def source(self, row: int) -> ClipSource:
        """Where the audio of a clip lies: what a decoding process is sent to read it. A subclass may have its own kind,
        of a class that other processes can import."""
        clip = self.clips[row]
        return FileClip(str(self.root / clip.path), clip.start, clip.end)

    def waveform(self, row: int, samples: int) -> tuple[np.ndarray, int]:
        """The audio of a clip, (samples,) float32 at 16 kHz, cut or zero-padded; and how many samples are real.

        Safe to call from several threads. Raises AudioError for what cannot be read, MissingAudioError for what is not
        there.
        """
        clip = self.source(row).read(samples)
        return as_float(clip.samples), clip.real

    def part(self, rows: Sequence[int]) -> Dataset:
        """These clips alone, to be sent to another process."""
        return replace(
            self,
            clips=tuple(self.clips[row] for row in rows),
            texts=tuple(self.texts[row] for row in rows) if self.texts else (),
            source_rows=tuple(self.source_row(row) for row in rows),
        )

    def source_row(self, row: int) -> int:
        """Where a clip lies in what the dataset was read from."""
        return self.source_rows[row] if self.source_rows else row

    def table(self) -> ClipTable:
        """The clips as columns, for the cache."""
        labels = np.zeros((len(self), len(self.class_names)), dtype=np.uint8)
        for row, clip in enumerate(self.clips):
            labels[row, list(clip.labels)] = 1
        return ClipTable(
            ids=np.array([clip.id for clip in self.clips], dtype=object),
            paths=np.array([as_text(clip.path) for clip in self.clips], dtype=object),
            fold=np.array([clip.fold for clip in self.clips], dtype=np.int16),
            split=np.array([clip.split for clip in self.clips], dtype=object),
            labels=labels,
        )


def as_text(path: str) -> str:
    """A file's name as text that can be stored, also where its bytes are not text."""
    return path if path.isascii() else path.encode("utf-8", "backslashreplace").decode()


def unique_ids(paths: list[str]) -> list[str]:
    """An id per relative path: the stem where all stems differ, else the path without its suffix, else the path."""
    for shorten in (_stem, _without_suffix):
        ids = [as_text(shorten(path)) for path in paths]
        if max(Counter(ids).values(), default=0) <= 1:
            return ids
    return [as_text(path) for path in paths]


def segment_ids(paths: list[str], spans: list[tuple[float | None, float | None]]) -> list[str]:
    """An id per part of a file: as `unique_ids`, with the start (and end) where several lie in one file.

    The same part of the same file twice gets the same id twice.
    """
    parts = Counter(paths)
    distinct = list(parts)
    ids_of = (unique_ids(distinct), [as_text(_without_suffix(path)) for path in distinct], distinct)
    ids: list[str] = []
    for names in ids_of:
        name_of = dict(zip(distinct, names, strict=True))
        for with_end in (False, True):
            ids = [
                name_of[path] + (seconds_suffix(*span, with_end=with_end) if parts[path] > 1 else "")
                for path, span in zip(paths, spans, strict=True)
            ]
            if len(set(ids)) == len(ids):
                return ids
    return ids


def seconds_suffix(start: float | None, end: float | None = None, *, with_end: bool = False) -> str:
    text = f"_{start or 0:.10g}"
    return f"{text}_{end:.10g}" if with_end and end is not None else text


def labels_as_rows(named: list[tuple[str, ...]], class_names: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Class names of each clip as ascending indices."""
    index = {name: at for at, name in enumerate(class_names)}
    return [tuple(sorted({index[name] for name in names})) for names in named]


def refuse_too_many_classes(class_names: Sized, place: object) -> None:
    if len(class_names) > MAX_CLASSES:
        raise UsageError(
            f"{place} has {len(class_names)} different labels; at most {MAX_CLASSES} make sense. Is its column of "
            "labels free text?"
        )


MAX_CLASSES = 20_000


def _stem(path: str) -> str:
    return Path(path).stem


def _without_suffix(text: str) -> str:
    path = Path(text)
    return path.with_suffix("").as_posix() if path.name else path.as_posix()
