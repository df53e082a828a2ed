"""A folder per class: ROOT/CLASS/FILE, or ROOT/SPLIT/CLASS/FILE with splits such as train and test.

Audio files right under ROOT, with no class folders, make an unlabelled dataset.
"""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.audio.decode import SUFFIXES
from whisper_at_cli.extract.datasets.base import Clip, Dataset, as_text, unique_ids
from whisper_at_cli.extract.datasets.scan import audio_files
from whisper_at_cli.extract.errors import UsageError

LAYOUT = "a folder per class with audio files in it"
SPLITS = {
    "train": "train", "training": "train",
    "val": "valid", "valid": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "eval": "eval", "evaluation": "eval",
}  # fmt: skip


def recognise(root: Path) -> bool:
    return root.is_dir()


def read(root: Path) -> Dataset:
    """Every audio file below `root`, sorted by path; the folder it lies in (below the split's) is its class."""
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; give a folder per class")
    paths = sorted(audio_files(root))
    if not paths:
        raise UsageError(f"{root} holds no audio files ({', '.join(sorted(SUFFIXES)[:6])}, ...); give {LAYOUT}")
    parts = [Path(path).parts[:-1] for path in paths]
    has_splits = all(part and part[0].lower() in SPLITS for part in parts)
    classes = [as_text("/".join(part[1:] if has_splits else part)) for part in parts]
    if any(classes) and not all(classes):
        stray = paths[classes.index("")]
        raise UsageError(
            f"{root} holds class folders and also {stray} outside of them; move it into its class's folder"
        )
    names = sorted(set(classes) - {""})
    index = {name: at for at, name in enumerate(names)}
    clips = tuple(
        Clip(
            id=name, path=path, labels=(index[label],) if label else (),
            split=SPLITS[part[0].lower()] if has_splits else "",
        )
        for name, path, part, label in zip(unique_ids(paths), paths, parts, classes, strict=True)
    )  # fmt: skip
    return Dataset(root.resolve().name, root, clips, tuple(names))
