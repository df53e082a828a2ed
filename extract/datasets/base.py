"""What every dataset reader returns."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.audio.decode import as_float
from whisper_at_cli.extract.audio.sources import ClipSource, FileClip
from whisper_at_cli.extract.cache.schema import ClipTable
from whisper_at_cli.extract.datasets.clips import Clip, Clips
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.texts import TEXT, as_objects, text_column


@dataclass(frozen=True)
class Dataset:
    """A named list of clips under one root folder. What a subclass reads its audio from need not be files.

    Clips may be given as any sequence; they are held as columns.
    """

    name: str
    root: Path
    clips: Sequence[Clip]
    class_names: tuple[str, ...] = ()
    clip_seconds: float = 10.0  # the length its clips are cut or padded to, unless the user asks for another
    notes: tuple[str, ...] = field(default=())  # what a user should know of how it was read
    texts: Sequence[str] = ()  # what is said in each clip, where a manifest tells
    missing_expected: bool = False  # a dataset of which nobody has every file
    source_rows: tuple[int, ...] = ()  # of a part: which rows of the whole it holds

    of_files = True  # each clip is a file, or a part of one

    def __post_init__(self) -> None:
        if not isinstance(self.clips, Clips):
            object.__setattr__(self, "clips", Clips.of(self.clips, len(self.class_names)))

    @property
    def columns(self) -> Clips:
        """The clips, with their columns."""
        assert isinstance(self.clips, Clips)
        return self.clips

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
            clips=self.columns.take(np.asarray(rows, dtype=np.int64)),
            texts=tuple(self.texts[row] for row in rows) if self.texts else (),
            source_rows=tuple(self.source_row(row) for row in rows),
        )

    def source_row(self, row: int) -> int:
        """Where a clip lies in what the dataset was read from."""
        return self.source_rows[row] if self.source_rows else row

    def table(self, *, sparse: bool = False) -> ClipTable:
        """The clips as columns, for the cache. With `sparse` labels are SparseLabels, which take a hundredth."""
        clips = self.columns
        paths = clips.paths if clips.paths.dtype == TEXT else text_column([as_text(path) for path in clips.paths])
        labels = clips.labels if sparse else clips.labels[:]
        return ClipTable(clips.ids, paths, clips.fold.astype(np.int16), as_objects(clips.split), labels)


def as_text(path: str) -> str:
    """A file's name as text that can be stored, also where its bytes are not text."""
    return path if path.isascii() else path.encode("utf-8", "backslashreplace").decode()


def unique_ids(paths: list[str]) -> list[str]:
    """An id per relative path: the stem where all stems differ, else the path without its suffix, else the path."""
    for shorten in (stem_of, without_suffix):
        ids = [as_text(shorten(path)) for path in paths]
        if len(set(ids)) == len(ids):
            return ids
    return [as_text(path) for path in paths]


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
UNUSUAL_NAMES = frozenset(("", ".", ".."))  # behind the last slash of a path


def stem_of(path: str) -> str:
    """`Path(path).stem`."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    if name in UNUSUAL_NAMES or dot == len(name) - 1:
        return Path(path).stem
    return name[:dot] if dot > 0 else name


def without_suffix(path: str) -> str:
    """A path without its suffix, and in one form: with single slashes and no `.` between them."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    if name.startswith("..") or name in UNUSUAL_NAMES or dot == len(name) - 1 or "//" in path or "./" in path:
        there = Path(path)
        return there.with_suffix("").as_posix() if there.name else there.as_posix()
    return path[: len(path) - len(name) + dot] if dot > 0 else path
