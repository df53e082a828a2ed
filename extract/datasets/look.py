"""A look at some of a dataset's files before encoding begins: which are missing, how much of the audio will be cut."""

from __future__ import annotations

import time
from dataclasses import replace

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.datasets.base import Dataset
from whisper_at_cli.extract.datasets.locate import evenly
from whisper_at_cli.extract.datasets.windows import Lengths, lengths_here

FILES = 200  # that are looked at; only their headers are read
AT_ONCE = 50  # files
SECONDS = 3.0  # that it may take: where headers do not tell a length, packets are counted
LONGER_SECONDS = 0.1  # by which a file may be longer without a note


def looked_at(dataset: Dataset, clip_seconds: float, lengths: Lengths = lengths_here, *, windows: bool) -> Dataset:
    """The dataset with notes on what some of its files show; clips of `clip_seconds`, or windows that leave no rest."""
    if not dataset.of_files:
        return dataset
    rows = evenly(len(dataset), FILES)
    there = [row for row in rows if dataset.is_there(row)]
    said = []
    if len(there) < len(rows) and not dataset.missing_expected:
        first = next(row for row in rows if row not in set(there))
        path = dataset.audio_path(dataset.clips[first])
        missing = len(rows) - len(there)
        looked = _looked(len(rows), len(dataset))
        said.append(notes.MISSING_FILES(missing=missing, clips=len(rows), looked=looked, path=path))
    if not windows:
        said += _cut(dataset, there, clip_seconds, lengths)
    return replace(dataset, notes=(*dataset.notes, *said))


def _cut(dataset: Dataset, rows: list[int], clip_seconds: float, lengths: Lengths) -> list[str]:
    """A note where clips are longer than what is encoded of them."""
    clips = [dataset.clips[row] for row in rows]
    found = [clip.end - (clip.start or 0.0) for clip in clips if clip.end is not None]
    whole = [str(dataset.audio_path(clip)) for clip in clips if clip.start is None and clip.end is None]
    limit = time.monotonic() + SECONDS
    for first in range(0, len(whole), AT_ONCE):
        found += [length[0] for length in lengths(whole[first : first + AT_ONCE]) if length is not None]
        if time.monotonic() > limit:
            break
    long = [seconds for seconds in found if seconds > clip_seconds + LONGER_SECONDS]
    if not long:
        return []
    share = 100 * sum(seconds - clip_seconds for seconds in long) / sum(found)
    looked = _looked(len(found), len(dataset))
    return [notes.CUT(long=len(long), clips=len(found), looked=looked, seconds=clip_seconds, share=share)]


def _looked(rows: int, clips: int) -> str:
    return "clips" if rows == clips else f"clips that were looked at, of {clips},"
