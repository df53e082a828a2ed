"""Which reader a folder or file is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.datasets import (
    audioset,
    datafile,
    esc50,
    folder,
    fsd50k,
    huggingface,
    lhotse,
    manifest,
    speech_commands,
    tar,
    urbansound8k,
    vggsound,
    waveforms,
)  # fmt: skip
from whisper_at_cli.extract.datasets.base import Dataset
from whisper_at_cli.extract.datasets.beside import below_wrappers
from whisper_at_cli.extract.datasets.scan import audio_files, folders_of, is_audio
from whisper_at_cli.extract.errors import UsageError


@dataclass(frozen=True)
class Format:
    """A layout: how it looks, whether a path has it, and its reader."""

    layout: str
    recognise: Callable[[Path], bool]
    read: Callable[..., Dataset]
    takes_labels: bool = False  # a list of classes, from the user


class Reader(Protocol):
    """What each module of this folder that reads a layout has."""

    LAYOUT: str

    def recognise(self, path: Path, /) -> bool: ...

    def read(self, path: Path, /) -> Dataset: ...


def _format(reader: Reader, *, takes_labels: bool = False) -> Format:
    return Format(reader.LAYOUT, reader.recognise, reader.read, takes_labels)


LAST_RESORT = "folder"
PUBLISHED = ("audioset", "esc50", "fsd50k", "urbansound8k", "speech-commands", "vggsound", "huggingface")
FORMATS = {  # in the order in which they are looked for: what only one layout has comes first
    "audioset": _format(audioset, takes_labels=True),
    "esc50": _format(esc50),
    "fsd50k": _format(fsd50k),
    "urbansound8k": _format(urbansound8k),
    "speech-commands": _format(speech_commands),
    "vggsound": _format(vggsound),
    "hdf5": _format(waveforms, takes_labels=True),
    "huggingface": _format(huggingface),
    "json": _format(datafile, takes_labels=True),
    "lhotse": _format(lhotse, takes_labels=True),
    "manifest": _format(manifest, takes_labels=True),
    "tar": _format(tar, takes_labels=True),
    "folder": _format(folder),
}


def open_dataset(path: str | Path, *, format: str = "auto", labels: str | Path | None = None) -> Dataset:
    """The dataset at `path`, read as `format` or as the first layout that fits.

    `path` is a folder, a file, a pattern of tar shards, or the address of a folder or file in a bucket. `labels` is a
    file that lists the classes, for layouts that do not carry such a list themselves. Raises UsageError where nothing
    is there, nothing fits, or no clip is found.
    """
    if "://" in str(path):
        if str(path).endswith(tar.SUFFIX):
            raise UsageError(f"{path}: tar shards are read from a disk only; copy them there first")
        from whisper_at_cli.extract.datasets.bucket import open_in_bucket

        return open_in_bucket(str(path), lambda shadow: open_dataset(shadow, format=format, labels=labels))
    path = Path(path)
    if format in ("auto", "tar") and tar.BRACES.search(str(path)) and not path.exists():
        return with_label_notes(_with_clips(tar.read_pattern(str(path), labels=_path(labels)), path, "tar"))
    if not path.exists():
        raise UsageError(f"{path} does not exist; give the dataset's folder or file")
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"dataset format {format!r} is not known; choose from {', '.join(FORMATS)}")
    given = path
    name, path = _recognised(path) if format == "auto" else (format, _inside(path, format))
    chosen = FORMATS[name]
    if labels is not None and not chosen.takes_labels:
        raise UsageError(f"{path} was read as {name}, which names its own classes; leave out --labels")
    read: Callable[..., Dataset] = (
        folder.read_as_last_resort if name == LAST_RESORT and format == "auto" else chosen.read
    )
    dataset = read(path, labels=Path(labels)) if labels is not None else read(path)
    said = dict.fromkeys((*dataset.notes, *_left_beside(given, path)))
    return with_label_notes(replace(_with_clips(dataset, path, name), notes=tuple(said)))


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _with_clips(dataset: Dataset, path: Path, name: str) -> Dataset:
    """The dataset, refused if it has no clip."""
    if not len(dataset):
        raise UsageError(f"{path} was read as {name} and lists no clips")
    return dataset


def _left_beside(given: Path, taken: Path) -> list[str]:
    """A note on audio that lies in the folder that was given, and outside of the one that is read."""
    outside: list[str] = []
    folder = taken
    while folder != given and given in folder.parents:
        for entry in sorted(folder.parent.iterdir()):
            inside = entry.relative_to(given).as_posix()
            if entry != folder and entry.name[:1] != ".":
                found = audio_files(entry) if entry.is_dir() else [""] if is_audio(entry.name) else []
                outside += [f"{inside}/{path}".rstrip("/") for path in found]
        folder = folder.parent
    if not outside:
        return []
    place = taken.relative_to(given).as_posix()
    return [notes.BESIDE_LEFT_OUT(folder=place, files=len(outside), names=notes.listed(outside))]


def with_label_notes(dataset: Dataset) -> Dataset:
    """The dataset with a note where it has no labels, or some of its clips have none."""
    alike: dict[str, list[str]] = {}
    for name in dataset.class_names:
        alike.setdefault(re.sub(r"[\s_-]+", "", name.casefold()), []).append(name)
    if several := [name for names in alike.values() if len(names) > 1 for name in names]:
        said = notes.CLASSES_ALIKE(names=notes.listed(several))
        dataset = replace(dataset, notes=(*dataset.notes, said))
    if not dataset.class_names:
        return replace(dataset, notes=(*dataset.notes, notes.NO_LABELS(name=dataset.name)))
    without = int((dataset.columns.labels.counts == 0).sum())
    if not without:
        return dataset
    said = notes.SOME_UNLABELLED(unlabelled=without, clips=len(dataset))
    return replace(dataset, notes=(*dataset.notes, said))


def _recognised(path: Path) -> tuple[str, Path]:
    """The layout of a path, and where it begins: the path itself or one folder deeper."""
    found = next((name for name, format in FORMATS.items() if format.recognise(path)), None)
    if found is None:
        known = "; ".join(f"{name}: {format.layout}" for name, format in FORMATS.items())
        raise UsageError(f"{path} is not a dataset in a known layout. Known layouts are {known}")
    if found != LAST_RESORT:
        return found, path
    below = below_wrappers(path)
    if below != path and (name := _published(below)):
        return name, below
    for place in dict.fromkeys((path, below)):
        inside = [(name, folder) for folder in folders_of(place) if (name := _published(folder))]
        if len(inside) > 1:
            listed = ", ".join(f"{folder.name} ({name})" for name, folder in inside)
            raise UsageError(f"{place} holds several datasets: {listed}; give one of these folders")
        if inside:
            return inside[0]
    return ("manifest", below) if below != path and manifest.recognise(below) else (found, path)


def _published(folder: Path) -> str | None:
    """The layout of a folder, if it is one that nothing else looks like."""
    return next((name for name in PUBLISHED if FORMATS[name].recognise(folder)), None)


def _inside(path: Path, format: str) -> Path:
    """Where a layout begins that was asked for: at the path, or else in its only folder that has that layout."""
    if format not in (*PUBLISHED, "manifest") or not path.is_dir() or FORMATS[format].recognise(path):
        return path
    below = below_wrappers(path)
    inside = [below] if FORMATS[format].recognise(below) else []
    if format in PUBLISHED:
        inside = inside or [folder for folder in folders_of(path) if FORMATS[format].recognise(folder)]
        inside = inside or [folder for folder in folders_of(below) if FORMATS[format].recognise(folder)]
    return inside[0] if len(inside) == 1 else path
