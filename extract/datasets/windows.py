"""Long files cut into windows: every file of a dataset becomes as many clips as it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.decode import audio_seconds
from whisper_at_cli.extract.datasets.base import Clip, Dataset, seconds_suffix
from whisper_at_cli.extract.errors import AudioError, UsageError

EXACT_SECONDS, INEXACT_SECONDS = 0.001, 0.05  # a rest shorter than this may not be there at all, and makes no window
MAX_CLIPS = 50_000_000


Length = tuple[float, bool]  # seconds, and whether that is exact to the sample
Lengths = Callable[[Sequence[str]], list[Length | None]]  # of files, by their paths


def length_of(path: str) -> Length | None:
    """How long a file is, by its header; None where that cannot be told."""
    try:
        return audio_seconds(path)
    except AudioError:
        return None


def lengths_here(paths: Sequence[str]) -> list[Length | None]:
    """`length_of` each file, read in this process."""
    return [length_of(path) for path in paths]


def windowed(
    dataset: Dataset, window: float, hop: float | None = None, *, lengths: Lengths = lengths_here
) -> Dataset:  # fmt: skip
    """`window` seconds from every `hop` seconds of each file (by default one window after the other).

    The last window is as short as its file leaves it. Lengths come from the files' headers, which `lengths` reads. A
    file whose length cannot be told keeps one clip, which fails with its reason when it is read.
    """
    hop = window if hop is None else hop
    for name, value in (("window", window), ("hop", hop)):
        if not (0.001 <= value < math.inf):
            raise UsageError(f"--{name} must be at least 0.001 s (got {value:g})")
    if not dataset.of_files:
        raise UsageError(f"{dataset.name} is not a dataset of audio files, so --window cannot cut it")
    paths = list(dict.fromkeys(str(dataset.audio_path(clip)) for clip in dataset.clips))
    length = dict(zip(paths, lengths(paths), strict=True))
    counts = [_window_count(clip, length[str(dataset.audio_path(clip))], window, hop) for clip in dataset.clips]
    if sum(counts) > MAX_CLIPS:
        raise UsageError(f"windows every {hop:g} s make {sum(counts)} clips; give a longer --hop")
    clips = tuple(
        part for clip, count in zip(dataset.clips, counts, strict=True) for part in _windows(clip, count, window, hop)
    )
    return replace(dataset, clips=_with_unique_ids(clips), clip_seconds=window, texts=(), source_rows=())


def _window_count(clip: Clip, length: Length | None, window: float, hop: float) -> int:
    """How many windows it takes to reach the end of a clip; 0 where its file's length cannot be told."""
    if length is None:
        return 0
    seconds, exact = length
    seconds -= EXACT_SECONDS if exact else INEXACT_SECONDS
    end = seconds if clip.end is None else min(clip.end, seconds)
    rest, whole, step = (round(value * SAMPLE_RATE) for value in (end - (clip.start or 0.0), window, hop))
    begin_before_the_end = -(-rest // step)
    return max(0, min(begin_before_the_end, 1 - (-max(0, rest - whole) // step)))


def _windows(clip: Clip, count: int, window: float, hop: float) -> Iterator[Clip]:
    if not count:
        yield clip
        return
    for number in range(count):
        start = (clip.start or 0.0) + number * hop
        end = None if clip.end is None else min(clip.end, start + window)
        yield replace(clip, id=clip.id + seconds_suffix(start), start=start, end=end)


def _with_unique_ids(clips: tuple[Clip, ...]) -> tuple[Clip, ...]:
    """The clips with ~2, ~3 ... behind an id that an earlier one has: `a_10` of a.wav and of an unreadable a_10.wav."""
    count = Counter(clip.id for clip in clips)
    if len(count) == len(clips):
        return clips
    seen: Counter[str] = Counter()
    unique = []
    for clip in clips:
        seen[clip.id] += 1
        number, name = seen[clip.id], clip.id
        while number > 1 and name in count:
            name, number = f"{clip.id}~{number}", number + 1
        count[name] += 0  # taken from now on
        unique.append(replace(clip, id=name))
    return tuple(unique)
