"""Which clips were cut from the same recording, told from their names.

Clips of one recording sound alike, so a model that trains on one and is tested on another is flattered. A dataset's
own folds mind that; random folds have to be grouped by recording. Only names that leave no doubt are grouped, and those
of a published dataset only where the cache says that it is this dataset:

    ESC-50          FOLD-SOURCE-TAKE-TARGET        1-17367-A-10       source 17367
    UrbanSound8K    SOURCE-CLASS-OCCURRENCE-SLICE  100032-3-0-0       source 100032
    AudioSet        VIDEO_START or VIDEO_START_END, VIDEO of eleven characters, with or without a Y before it
    any             NAME_partN, _segN, _segmentN, _chunkN, _sliceN, _cropN, _excerptN (or with - or . or a space),
                    the source being NAME in the same folder
    any             several clips with the same path: parts or windows of one file
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath

import numpy as np

PUBLISHED = {  # by the name that a reader gives to its dataset
    "esc50": re.compile(r"\d+-(\d+)-[A-Z]-\d+"),
    "urbansound8k": re.compile(r"(\d+)-\d+-\d+-\d+"),
    "audioset": re.compile(r"Y?([A-Za-z0-9_-]{11})_\d+(?:\.\d+)?(?:_\d+(?:\.\d+)?)?"),
}
PART = re.compile(r"(.+?)[-_. ](?:part|seg|segment|chunk|slice|crop|excerpt)[-_ ]?\d+", re.IGNORECASE)
SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}$")


def source_recordings(ids: np.ndarray, paths: np.ndarray, dataset: str = "") -> np.ndarray:
    """(N,) str: the recording that each clip was cut from, by its id, else by its path; else one of its own.

    `dataset` is the name that its reader gave it, as `esc50`.
    """
    pattern, times = PUBLISHED.get(dataset), Counter(str(path) for path in paths)
    return np.array(
        [
            _source(str(name), pattern)
            or _source(str(path), pattern)
            or (f"file {path}" if path and times[str(path)] > 1 else f"clip {name}")
            for name, path in zip(ids, paths, strict=True)
        ],
        dtype=object,
    )


def _source(name: str, pattern: re.Pattern | None) -> str | None:
    stem = SUFFIX.sub("", PurePosixPath(name).name)
    match = pattern.fullmatch(stem) if pattern else None
    if match:
        return f"source {match[1]}"
    match = PART.fullmatch(stem)
    return f"file {PurePosixPath(name).parent / match[1]}" if match else None
