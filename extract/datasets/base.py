"""What every dataset reader returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.audio import load_clip
from whisper_at_cli.extract.cache.schema import ClipTable


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of a dataset."""

    id: str  # unique
    path: str  # relative to the dataset's root
    labels: tuple[int, ...] = ()  # indices into the dataset's class names
    fold: int = 0  # official fold from 1, 0 where there is none
    split: str = ""  # train, valid, test, eval, or empty


@dataclass(frozen=True)
class Dataset:
    """A named list of clips under one root folder."""

    name: str
    root: Path
    clips: tuple[Clip, ...]
    class_names: tuple[str, ...] = ()
    clip_seconds: float = 10.0  # the length its clips are cut or padded to, unless the user asks for another
    notes: tuple[str, ...] = field(default=())  # what a user should know of how it was read

    def __len__(self) -> int:
        return len(self.clips)

    def audio_path(self, clip: Clip) -> Path:
        return self.root / clip.path

    def waveform(self, row: int, samples: int) -> tuple[np.ndarray, int]:
        """The audio of a clip, (samples,) float32 at 16 kHz, cut or zero-padded; and how many samples are real.

        Called from several threads at once. Raises AudioError for what cannot be read.
        """
        return load_clip(self.audio_path(self.clips[row]), samples)

    def part(self, rows: Sequence[int]) -> Dataset:
        """These clips alone, to be sent to another process."""
        return replace(self, clips=tuple(self.clips[row] for row in rows))

    def table(self) -> ClipTable:
        """The clips as columns, for the cache."""
        labels = np.zeros((len(self), len(self.class_names)), dtype=np.uint8)
        for row, clip in enumerate(self.clips):
            labels[row, list(clip.labels)] = 1
        return ClipTable(
            ids=np.array([clip.id for clip in self.clips]),
            paths=np.array([clip.path for clip in self.clips]),
            fold=np.array([clip.fold for clip in self.clips], dtype=np.int16),
            split=np.array([clip.split for clip in self.clips]),
            labels=labels,
        )


def unique_ids(paths: list[str]) -> list[str]:
    """An id per relative path: the stem where all stems differ, else the path without its suffix, else the path."""
    for shorten in (lambda path: Path(path).stem, lambda path: Path(path).with_suffix("").as_posix()):
        ids = [shorten(path) for path in paths]
        if max(Counter(ids).values(), default=0) <= 1:
            return ids
    return list(paths)
