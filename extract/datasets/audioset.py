"""AudioSet: the published segment lists, class_labels_indices.csv, and whatever audio one could still get.

Audio lies anywhere below, as YTID.*, YYTID.* or YTID_start.*, already cut to its ten seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.cells import as_name, as_span
from whisper_at_cli.extract.datasets.base import Clip, Dataset
from whisper_at_cli.extract.datasets.classes import ClassList, classes_beside
from whisper_at_cli.extract.datasets.scan import audio_files
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import plain_rows

LISTS = {
    "balanced_train_segments.csv": "train",
    "unbalanced_train_segments.csv": "train",
    "eval_segments.csv": "eval",
}
HEADER = ["YTID", "start_seconds"]
LAYOUT = (
    f"{', '.join(LISTS)} (those that are there, or one of them as DATASET) and class_labels_indices.csv, with audio "
    "below as YTID.*, YYTID.* or YTID_start.*"
)


@dataclass(frozen=True, slots=True)
class _Segment:
    ytid: str
    start: float
    end: float
    labels: tuple[int, ...]
    split: str


def recognise(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in LISTS)
    return path.suffix == ".csv" and (path.name in LISTS or _looks_like_segments(path))


def read(path: Path, *, labels: Path | None = None) -> Dataset:
    """Every segment of the lists, in their order, whether or not its file is there."""
    root = path if path.is_dir() else path.parent
    lists = [path] if path.is_file() else [root / name for name in LISTS if (root / name).is_file()]
    if not lists:
        raise UsageError(f"{path} holds none of {', '.join(LISTS)}; AudioSet's layout is {LAYOUT}")
    said: list[str] = []
    classes = classes_beside(lists[0], labels, said)
    if classes is None:
        raise UsageError(f"{root} holds no class_labels_indices.csv; put AudioSet's there, or name it with --labels")
    seen: set[tuple[str, float]] = set()
    segments = [segment for file in lists for segment in _segments(file, classes, seen)]
    times = Counter(segment.ytid for segment in segments)
    files, twice = _files_by_stem(root)
    clips = []
    for segment in segments:
        shared = times[segment.ytid] > 1
        name = f"{segment.ytid}_{segment.start:.10g}" if shared else segment.ytid
        file = _file_of(segment, files, shared)
        clips.append(Clip(name, file or segment.ytid, segment.labels, split=segment.split))
    if twice:
        said.append(notes.SAME_NAME(count=len(twice), names=notes.listed(twice)))
    return Dataset(
        "audioset", root, tuple(clips), classes.names, clip_seconds=10.0, notes=tuple(said), missing_expected=True
    )


def _segments(path: Path, classes: ClassList, seen: set[tuple[str, float]]) -> Iterator[_Segment]:
    split = LISTS.get(path.name) or ("eval" if "eval" in path.name else "train")
    for place, row in plain_rows(path):
        if row[:2] == HEADER:  # without the # that it is published with
            continue
        if len(row) != 4:
            raise UsageError(f"{place} has {len(row)} fields; a segment has YTID, start_seconds, end_seconds, labels")
        ytid = as_name(row[0], "YTID", place)
        if not ytid or "/" in ytid:
            raise UsageError(f"{place}: {ytid!r} is not a YouTube id")
        start, end = as_span(row[1], row[2], place)
        if start is None or end is None:
            raise UsageError(f"{place}: start and end are needed")
        if (ytid, start) in seen:
            raise UsageError(f"{place}: segment {ytid} from {start:g} s is listed twice")
        seen.add((ytid, start))
        names = [name for label in row[3].split(",") if (name := label.strip())]
        yield _Segment(ytid, start, end, classes.numbers(names, place), split)


def _files_by_stem(root: Path) -> tuple[dict[str, str], list[str]]:
    """Audio files below by name without suffix, found in one pass; and those of which there are several."""
    files: dict[str, str] = {}
    twice = []
    for path in audio_files(root):
        stem = path[path.rfind("/") + 1 : path.rfind(".")]
        if files.setdefault(stem, path) is not path:
            twice.append(stem)
    return files, twice


def _file_of(segment: _Segment, files: dict[str, str], shared: bool) -> str | None:
    """The file of a segment, by any of the names under which people keep it."""
    for stem in (segment.ytid, f"Y{segment.ytid}"):
        if not shared and stem in files:
            return files[stem]
        for form in ("{:.3f}", "{:g}", "{:.10g}", "{:.0f}"):
            start, end = form.format(segment.start), form.format(segment.end)
            milliseconds = f"{segment.start * 1000:.0f}", f"{segment.end * 1000:.0f}"
            for tail in (start, f"{start}_{end}", milliseconds[0], "_".join(milliseconds)):
                if f"{stem}_{tail}" in files:
                    return files[f"{stem}_{tail}"]
    return None


def _looks_like_segments(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return any(line.lstrip("# ").startswith("YTID") for _, line in zip(range(5), file, strict=False))
    except OSError:
        return False
