"""FSD50K as published (FSD50K.dev_audio, FSD50K.eval_audio, FSD50K.ground_truth), or as on the Hugging Face hub
(clips/dev, clips/eval, labels)."""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.cells import as_name
from whisper_at_cli.extract.datasets.base import Clip, Dataset, labels_as_rows, unique_ids
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import Table, columns_of, plain_rows

TRUTHS = ("FSD50K.ground_truth", "labels", "ground_truth", "FSD50K.ground_truth/FSD50K.ground_truth")
AUDIO = {"dev": ("FSD50K.dev_audio", "clips/dev"), "eval": ("FSD50K.eval_audio", "clips/eval")}
SPLITS = {"train": "train", "val": "valid"}
LAYOUT = (
    f"{TRUTHS[0]}/dev.csv and eval.csv (either will do) and vocabulary.csv beside FSD50K.dev_audio/ and "
    "FSD50K.eval_audio/"
)


def recognise(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".csv" and path.stem in AUDIO and _truth(path.parent.parent) == path.parent
    return _truth(path) is not None


def read(path: Path) -> Dataset:
    """All clips of dev.csv and eval.csv that are there, or of the one that is given; 200 classes as vocabulary.csv
    numbers them."""
    path, parts = (path, tuple(AUDIO)) if not path.is_file() else (path.parent.parent, (path.stem,))
    truth = _truth(path)
    if truth is None:
        raise UsageError(f"{path / TRUTHS[0]} holds neither dev.csv nor eval.csv; FSD50K's layout is {LAYOUT}")
    files, named, splits, said = [], [], [], []
    for part in parts:
        if not (truth / f"{part}.csv").is_file():
            continue
        table = Table(truth / f"{part}.csv")
        table.need("fname", "labels", *(("split",) if part == "dev" else ()))
        folder = next((name for name in AUDIO[part] if (path / name).is_dir()), AUDIO[part][0])
        for place, row in table.rows():
            if part == "dev" and row["split"] not in SPLITS:
                raise UsageError(f"{place}: split is {row['split']!r}, not train or val")
            files.append(f"{folder}/{_file(row['fname'], place)}")
            named.append((place, tuple(name.strip() for name in row["labels"].split(",") if name.strip())))
            splits.append(SPLITS[row["split"]] if part == "dev" else "eval")
        said += table.notes
    names = _vocabulary(truth) or tuple(sorted({name for _, labels in named for name in labels}))
    known = set(names)
    for place, labels in named:
        if unknown := next((name for name in labels if name not in known), None):
            raise UsageError(f"{place}: label {unknown!r} is not in {truth / 'vocabulary.csv'}")
    paths, moved = located(path, files, published=True)
    clips = tuple(
        Clip(name, file, labels, split=split)
        for name, file, labels, split in zip(
            unique_ids(paths), paths, labels_as_rows([labels for _, labels in named], names), splits, strict=True
        )
    )
    return Dataset("fsd50k", path, clips, names, notes=(*said, *moved))


def _truth(path: Path) -> Path | None:
    """The folder of the tables; one called just `labels` must hold FSD50K's own columns."""
    for name in TRUTHS:
        folder = path / name
        if any((folder / f"{part}.csv").is_file() for part in AUDIO) and (
            "FSD50K" in name or any("fname" in columns_of(folder / f"{part}.csv") for part in AUDIO)
        ):
            return folder
    return None


def _file(fname: str, place: str) -> str:
    """A file's name from its number, which pandas may have written as 64760.0."""
    name = as_name(fname, "fname", place).removesuffix(".0")
    if not name:
        raise UsageError(f"{place} names no file")
    return name if name.endswith(".wav") else f"{name}.wav"


def _vocabulary(truth: Path) -> tuple[str, ...]:
    """Class names by their number; empty where the file is not there."""
    file = truth / "vocabulary.csv"
    if not file.is_file():
        return ()
    names = {}
    for place, row in plain_rows(file):
        if len(row) < 2 or not (row[0].isascii() and row[0].isdecimal() and len(row[0]) < 8) or int(row[0]) in names:
            raise UsageError(f"{place}: expected a number that no other line has, a class name and a machine id")
        names[int(row[0])] = row[1].strip()
    if len(set(names.values())) != len(names):
        raise UsageError(f"{file} names a class twice")
    return tuple(names[number] for number in sorted(names))
