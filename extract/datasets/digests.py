"""What tells a clip's audio from what it was before, without reading it: file, part, size and time."""

from __future__ import annotations

import math
import os
from hashlib import blake2b
from itertools import repeat

import numpy as np

from whisper_at_cli.extract.audio.sources import ClipSource, FileClip, PackClip, TableClip, TarClip
from whisper_at_cli.extract.cache.changes import with_time
from whisper_at_cli.extract.datasets.base import Dataset


def source_digests(dataset: Dataset) -> np.ndarray:
    """(N,) uint64, one for each clip; 0 where its file is not there.

    The last TIME_BITS are of the file's time, the others of all else. Of a file: its path within the dataset, the part
    of it, its size and the time of its last change. Of a row of a pack, and of a member of a tar shard, the same of
    that; of a row of a table without the time, since tables are unpacked again and again. Of an object in a bucket its
    name and the part.
    """
    if type(dataset).source is Dataset.source:
        return _of_files(dataset)
    digests = np.zeros(len(dataset), np.uint64)
    stats: dict[str, tuple[int, int] | None] = {}
    for row in range(len(dataset)):
        source, path = dataset.source(row), dataset.columns.paths[row]
        time = 0
        what, file, timed = _described(source, path)
        if file:
            if file not in stats:
                stats = {file: _stat(file)}  # parts of one file follow each other
            found = stats[file]
            if found is None:
                continue
            what += (found[0],)
            time = _hash((found[1],)) if timed else 0
        digests[row] = with_time(_hash(what), time)
    return digests


def _of_files(dataset: Dataset) -> np.ndarray:
    """`source_digests` of clips that are files or parts of them, from columns."""
    clips, digests = dataset.columns, np.zeros(len(dataset), np.uint64)
    starts, ends = (repeat(math.nan) if column is None else column.tolist() for column in (clips.start, clips.end))
    root, before, found = str(dataset.root), None, None
    for row, path, start, end in zip(range(len(clips)), clips.paths, starts, ends, strict=False):
        if path != before:  # parts of one file follow each other
            before, found = path, _stat(os.path.join(root, path))  # noqa: PTH118 - of millions of files
        if found is not None:
            part = (None if math.isnan(start) else start, None if math.isnan(end) else end)
            digests[row] = with_time(_hash((path, *part, found[0])), _hash((found[1],)))
    return digests


def _hash(values: tuple) -> int:
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest(), "little")


def _described(source: ClipSource, path: str) -> tuple[tuple, str, bool]:
    """What is known of a clip's audio, the file whose size counts too (or none), and whether its time does."""
    if isinstance(source, FileClip):
        return (path, source.start, source.end), source.path, True
    if isinstance(source, PackClip):
        return (source.row,), source.path, True
    if isinstance(source, TarClip):
        return (path, source.offset, source.size), source.path, True
    if isinstance(source, TableClip):
        return (source.row, source.column), source.table, False
    return (path, getattr(source, "start", None), getattr(source, "end", None)), "", False


def _stat(file: str) -> tuple[int, int] | None:
    """Size and time of a file, if it is there."""
    try:
        found = os.stat(file)  # noqa: PTH116 - of millions of files
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns
