"""VGGSound: vggsound.csv (YouTube id, start, label, split; no header) and clips below as ID_START.*."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from whisper_at_cli.extract.cells import as_label, as_name, as_whole
from whisper_at_cli.extract.datasets.base import Clip, Dataset, labels_as_rows, refuse_too_many_classes
from whisper_at_cli.extract.datasets.scan import audio_files
from whisper_at_cli.extract.datasets.splits import SPLITS
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import plain_rows

TABLE = "vggsound.csv"
LAYOUT = f"{TABLE} (YouTube id, start, label, split), with audio below as ID_START.*"


def recognise(path: Path) -> bool:
    return _table(path).name == TABLE and _table(path).is_file()


def read(path: Path) -> Dataset:
    """Every row of the table, in its order, whether or not its file is there: nobody has all of them."""
    table = _table(path)
    if not table.is_file():
        raise UsageError(f"{table} does not exist; VGGSound's layout is {LAYOUT}")
    root = table.parent
    files = {PurePosixPath(file).stem: file for file in sorted(audio_files(root), reverse=True)}
    labels: list[tuple[str, ...]] = []
    names, paths, splits = [], [], []
    seen: dict[str, str] = {}
    for place, row in plain_rows(table):
        if len(row) != 4 or row[3].lower() not in SPLITS:
            raise UsageError(f"{place}: expected a YouTube id, a start in seconds, a label, and train or test")
        start = as_whole(row[1], "start", place)
        name = f"{as_name(row[0], 'the YouTube id', place)}_{start:06d}"
        if name in seen:
            raise UsageError(f"{place} lists {name}, as {seen[name]} does; keep one of them")
        seen[name] = place.split(" of ")[0]
        names.append(name)
        paths.append(next((files[stem] for stem in (name, row[0], f"{row[0]}_{start}") if stem in files), name))
        labels.append((as_label(row[2], place),))
        splits.append(SPLITS[row[3].lower()])
    classes = tuple(sorted({label for each in labels for label in each}))
    refuse_too_many_classes(classes, table)
    clips = tuple(
        Clip(name, file, row, split=split)
        for name, file, row, split in zip(names, paths, labels_as_rows(labels, classes), splits, strict=True)
    )
    return Dataset("vggsound", root, clips, classes, clip_seconds=10.0, missing_expected=True)


def _table(path: Path) -> Path:
    return path / TABLE if path.is_dir() else path
