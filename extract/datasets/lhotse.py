"""Cut manifests of lhotse: cuts.jsonl or cuts.jsonl.gz, a cut a line, each a part of a recording in one audio file.

Labels are in the custom fields of a cut or of its supervisions, under the names that a manifest's column of labels may
have; what supervisions say is the text. Features are not read, and what would have to be computed first is refused.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.cells import as_seconds, shown
from whisper_at_cli.extract.datasets.base import Dataset
from whisper_at_cli.extract.datasets.classes import read_classes
from whisper_at_cli.extract.datasets.columns import LABEL_NAMES, Columns
from whisper_at_cli.extract.datasets.entries import entry_of, rebased
from whisper_at_cli.extract.datasets.manifest import dataset_of
from whisper_at_cli.extract.datasets.rows import RowsBuilder
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import LINE_CHARACTERS, column_name, parsed

LAYOUT = "a cut manifest of lhotse, cuts.jsonl or cuts.jsonl.gz, of MonoCuts whose recordings are audio files"
SUFFIXES = (".jsonl", ".jsonl.gz")
CUTS = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut", "DataCut", "Cut")
NO_CHANGE = frozenset(("Resample",))  # of a recording's transforms: whatever its rate, audio is decoded to 16 kHz
WHOLE_SECONDS = 0.001  # by which a cut may miss the end of its recording and be all of it


def recognise(path: Path) -> bool:
    """A file whose first line is a cut."""
    if not (path.name.lower().endswith(SUFFIXES) and path.is_file()):
        return False
    try:
        first = next(_cuts(path), None)
    except UsageError:
        return False
    return first is not None and first[1].get("type") in CUTS


def read(path: Path, *, labels: Path | None = None) -> Dataset:
    """Every cut, in its order. Paths are relative to the manifest's folder or the one above it."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give {LAYOUT}")
    builder, said = RowsBuilder(), list[str]()
    kinds: dict[str, None] = {}
    for number, cut in _cuts(path):
        place = f"line {number} of {path}"
        row = _row(cut, place)
        kinds.update(dict.fromkeys(name for name in ("labels", "text", "fold", "split") if row.get(name)))
        builder.add(entry_of(row, place, Columns("audio", "labels")))
    root, rows = rebased(builder.rows(path), path, path.parent, may_move=True)
    said.append(notes.CUTS_READ(cuts=len(rows), what=notes.listed(["audio", *kinds])))
    classes = read_classes(labels, said) if labels else None
    return dataset_of(rows, path, classes, root, tuple(said))


def _cuts(path: Path) -> Iterator[tuple[int, dict]]:
    """Each line with its number. Raises UsageError where one is no JSON object, or the file cannot be read."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            lines = io.TextIOWrapper(file, encoding="utf-8")
            for number, line in enumerate(iter(lambda: lines.readline(LINE_CHARACTERS), ""), start=1):
                if not line.strip():
                    continue
                cut = parsed(line, f"line {number} of {path}")
                if not isinstance(cut, dict):
                    raise UsageError(f"line {number} of {path} is not a JSON object, as a cut is")
                yield number, cut
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise UsageError(f"{path} is not a readable cut manifest: {error}") from error


def _row(cut: dict, place: str) -> dict:
    """What a cut says, under the names of a manifest's columns."""
    if cut.get("type", "MonoCut") != "MonoCut":
        raise UsageError(f"{place} is a {shown(cut.get('type'))}, which is not read here; only MonoCuts are")
    recording = cut.get("recording")
    if not isinstance(recording, dict):
        raise UsageError(f"{place} has no recording, only features perhaps; write the cuts with their recordings")
    supervisions = [each for each in cut.get("supervisions") or [] if isinstance(each, dict)]
    start, duration = (as_seconds(cut.get(name), name, place) for name in ("start", "duration"))
    if not duration:
        raise UsageError(f"{place} has no duration")
    end = (start or 0.0) + duration
    length = as_seconds(recording.get("duration"), "duration of the recording", place)
    if not start and length is not None and end >= length - WHOLE_SECONDS:
        start = end = None  # type: ignore[assignment]
    custom = [_custom(each) for each in (cut, *supervisions)]
    labels = [label for fields in custom for label in _labels(fields)]
    text = " ".join(text for each in supervisions if isinstance(text := each.get("text"), str) and text.strip())
    return {
        "audio": _file(recording, cut.get("channel", 0), place), "start": start, "end": end, "labels": labels,
        "text": " ".join(text.split()), "id": cut.get("id"), "fold": custom[0].get("fold"),
        "split": custom[0].get("split"),
    }  # fmt: skip


def _file(recording: dict, channel: object, place: str) -> str:
    """The one file of a recording of one channel."""
    sources = recording.get("sources")
    source = sources[0] if isinstance(sources, list) and len(sources) == 1 else None
    if not isinstance(source, dict):
        count = len(sources) if isinstance(sources, list) else "no"
        raise UsageError(f"{place}: its recording has {count} sources; one file is read")
    if source.get("type") != "file":
        raise UsageError(f"{place}: its audio is a {shown(source.get('type'))}; only files are read")
    channels = source.get("channels", [0])
    if channels != [channel]:
        raise UsageError(
            f"{place}: channel {shown(channel)} of a file with the channels {shown(channels)}; files of one channel "
            "are read: write the channels to files of their own"
        )
    for transform in recording.get("transforms") or []:
        name = transform.get("name") if isinstance(transform, dict) else transform
        if name not in NO_CHANGE:
            raise UsageError(f"{place}: its recording is changed by {shown(name)}; save the changed audio first")
    file = source.get("source")
    if not isinstance(file, str):
        raise UsageError(f"{place} names no audio file")
    return file


def _custom(part: dict) -> dict:
    custom = part.get("custom")
    return {column_name(key): value for key, value in custom.items()} if isinstance(custom, dict) else {}


def _labels(custom: dict) -> list:
    value: object = next((custom[name] for name in LABEL_NAMES if custom.get(name) not in (None, "", [])), [])
    return value if isinstance(value, list) else [value]
