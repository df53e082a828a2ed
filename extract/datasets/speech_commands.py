"""Speech Commands as published: a folder per word, validation_list.txt and testing_list.txt."""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.datasets import tables
from whisper_at_cli.extract.datasets.base import Clip, Dataset, unique_ids
from whisper_at_cli.extract.datasets.scan import audio_files
from whisper_at_cli.extract.errors import UsageError

LISTS = {"validation_list.txt": "valid", "testing_list.txt": "test"}
NOISE = "_background_noise_/"  # minutes long, and no word
LAYOUT = "a folder per word beside validation_list.txt and testing_list.txt"


def recognise(path: Path) -> bool:
    return all((path / name).is_file() for name in LISTS)


def read(path: Path) -> Dataset:
    """Every word that is there or listed; what is in neither list is for training. Background noises are left out."""
    if not recognise(path):
        raise UsageError(f"{path} lacks {' or '.join(LISTS)}; the layout of Speech Commands is {LAYOUT}")
    split_of: dict[str, str] = {}
    for name, split in LISTS.items():
        for line in tables.text_lines(path / name):
            file = tables.as_name(line, "a line", str(path / name))
            if "/" not in file:
                raise UsageError(f"{path / name} names {file[:60]!r}; a line is WORD/FILE")
            if split_of.setdefault(file, split) != split:
                raise UsageError(f"{path / name} names {file!r}, which is in the other list too")
    found = [file for file in audio_files(path) if "/" in file]
    files = sorted({*split_of, *(file for file in found if not file.startswith(NOISE))})
    words = sorted({file.split("/")[0] for file in files})
    index = {word: at for at, word in enumerate(words)}
    clips = tuple(
        Clip(name, file, (index[file.split("/")[0]],), split=split_of.get(file, "train"))
        for name, file in zip(unique_ids(files), files, strict=True)
    )
    left_out = sum(file.startswith(NOISE) for file in found)
    notes = (f"{left_out} files of {NOISE} were left out: they are no words",) if left_out else ()
    return Dataset("speech-commands", path, clips, tuple(words), clip_seconds=1.0, notes=notes)
