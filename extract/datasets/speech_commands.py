"""Speech Commands: a folder per word, validation_list.txt and testing_list.txt; on Kaggle the words lie in audio/."""

from __future__ import annotations

import posixpath
from pathlib import Path

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.cells import as_name
from whisper_at_cli.extract.datasets.base import Clip, Dataset, unique_ids
from whisper_at_cli.extract.datasets.scan import audio_files
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import text_lines

LISTS = {"validation_list.txt": "valid", "testing_list.txt": "test"}
NOISE = "_background_noise_/"  # minutes long, and no word
PACKED = "audio"  # where Kaggle has the words
LAYOUT = "a folder per word beside validation_list.txt and testing_list.txt"


def recognise(path: Path) -> bool:
    return all((path / name).is_file() for name in LISTS)


def read(path: Path) -> Dataset:
    """Every word that is there or listed; what is in neither list is for training. Background noises are left out."""
    if not recognise(path):
        raise UsageError(f"{path} lacks {' or '.join(LISTS)}; the layout of Speech Commands is {LAYOUT}")
    said: list[str] = []
    split_of: dict[str, str] = {}
    for name, split in LISTS.items():
        for line in text_lines(path / name, said):
            file = posixpath.normpath(as_name(line, "a line", str(path / name)).replace("\\", "/"))
            if "/" not in file:
                raise UsageError(f"{path / name} names {file[:60]!r}; a line is WORD/FILE")
            if split_of.setdefault(file, split) != split:
                raise UsageError(f"{path / name} names {file!r}, which is in the other list too")
    found = [file for file in audio_files(path) if "/" in file]
    root = path
    if found and all(file.startswith(f"{PACKED}/") for file in found):
        root, found = path / PACKED, [file.removeprefix(f"{PACKED}/") for file in found]
    files = sorted({*split_of, *(file for file in found if not file.startswith(NOISE) and "/" in file)})
    words = sorted({file.split("/")[0] for file in files})
    index = {word: at for at, word in enumerate(words)}
    clips = tuple(
        Clip(name, file, (index[file.split("/")[0]],), split=split_of.get(file, "train"))
        for name, file in zip(unique_ids(files), files, strict=True)
    )
    if left_out := sum(file.startswith(NOISE) for file in found):
        said.append(notes.BACKGROUND_NOISE(files=left_out, folder=NOISE))
    return Dataset("speech-commands", root, clips, tuple(words), clip_seconds=1.0, notes=tuple(said))
