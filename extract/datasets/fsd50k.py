"""FSD50K as published: FSD50K.dev_audio, FSD50K.eval_audio and FSD50K.ground_truth."""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.datasets import tables
from whisper_at_cli.extract.datasets.base import Clip, Dataset, labels_as_rows, unique_ids
from whisper_at_cli.extract.errors import UsageError

TRUTH = "FSD50K.ground_truth"
PARTS = {"dev": "FSD50K.dev_audio", "eval": "FSD50K.eval_audio"}
SPLITS = {"train": "train", "val": "valid"}
LAYOUT = (
    f"{TRUTH}/dev.csv and eval.csv (either will do) and vocabulary.csv beside FSD50K.dev_audio/ and FSD50K.eval_audio/"
)


def recognise(path: Path) -> bool:
    return any((path / TRUTH / f"{part}.csv").is_file() for part in PARTS)


def read(path: Path) -> Dataset:
    """All clips of dev.csv and eval.csv that are there; 200 classes as vocabulary.csv numbers them."""
    lists = {part: file for part in PARTS if (file := path / TRUTH / f"{part}.csv").is_file()}
    if not lists:
        raise UsageError(f"{path / TRUTH} holds neither dev.csv nor eval.csv; FSD50K's layout is {LAYOUT}")
    files, named, splits = [], [], []
    for part, file in lists.items():
        for place, row in tables.csv_rows(file, needs=("fname", "labels") + (("split",) if part == "dev" else ())):
            if part == "dev" and row["split"] not in SPLITS:
                raise UsageError(f"{place}: split is {row['split']!r}, not train or val")
            files.append(f"{PARTS[part]}/{tables.as_name(row['fname'], 'fname', place)}.wav")
            named.append((place, tuple(name.strip() for name in row["labels"].split(",") if name.strip())))
            splits.append(SPLITS[row["split"]] if part == "dev" else "eval")
    names = _vocabulary(path) or tuple(sorted({name for _, labels in named for name in labels}))
    known = set(names)
    for place, labels in named:
        if unknown := next((name for name in labels if name not in known), None):
            raise UsageError(f"{place}: label {unknown!r} is not in {path / TRUTH / 'vocabulary.csv'}")
    clips = tuple(
        Clip(name, file, labels, split=split)
        for name, file, labels, split in zip(
            unique_ids(files), files, labels_as_rows([labels for _, labels in named], names), splits, strict=True
        )
    )
    return Dataset("fsd50k", path, clips, names)


def _vocabulary(path: Path) -> tuple[str, ...]:
    """Class names by their number; empty where the file is not there."""
    file = path / TRUTH / "vocabulary.csv"
    if not file.is_file():
        return ()
    names = {}
    for place, row in tables.plain_csv_rows(file):
        if len(row) < 2 or not (row[0].isascii() and row[0].isdecimal() and len(row[0]) < 8) or int(row[0]) in names:
            raise UsageError(f"{place} is not: a number of its own, a class name, a machine id")
        names[int(row[0])] = row[1].strip()
    if len(set(names.values())) != len(names):
        raise UsageError(f"{file} names a class twice")
    return tuple(names[number] for number in sorted(names))
