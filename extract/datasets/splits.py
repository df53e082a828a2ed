"""What folders of splits, of audio and of tables are called, and by which of our names splits go."""

from __future__ import annotations

import re

SPLITS = {
    "train": "train", "training": "train",
    "val": "valid", "valid": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "testing": "test", "eval": "eval", "evaluation": "eval",
}  # fmt: skip
CONTAINERS = frozenset(  # folders that hold files of any class
    "audio audios audio_files audiofiles data dataset wav wavs flac flacs mp3 mp3s ogg clips sounds recordings files "
    "video videos".split()
)

TABLES = frozenset(  # folders that hold tables
    "meta metadata label labels annotation annotations csv list lists split splits info tables".split()
)


def split_of(name: str) -> str:
    """The split that a file is of by its name, as `train`, `esc_train` or `test-labels`; nothing if none or several."""
    found = {SPLITS[part] for part in re.split(r"[^a-z]+", name.lower()) if part in SPLITS}
    return found.pop() if len(found) == 1 else ""
