"""HDF5 packs as PANNs makes them: audio_name (N,), waveform (N, samples) int16, target (N, classes)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.audio.sources import PackClip
from whisper_at_cli.extract.cells import MAX_FOLD, from_one
from whisper_at_cli.extract.datasets.apart import look_apart
from whisper_at_cli.extract.datasets.base import Clip, Dataset, as_text, unique_ids
from whisper_at_cli.extract.datasets.classes import classes_beside
from whisper_at_cli.extract.errors import UsageError

if TYPE_CHECKING:
    import h5py

SIGNATURE = b"\x89HDF\r\n\x1a\n"
PANNS_RATE = 32000  # of packs that do not say
LAYOUT = (
    "an HDF5 file with audio_name (clips,), waveform (clips, samples) of int16 and, for labels, target (clips, "
    "classes); sample rate in its attribute sample_rate"
)
NEEDED, OPTIONAL = ("audio_name", "waveform"), ("target", "fold")
UNPACKED = 1 << 20  # bytes that may be read of anything; what is packed holds at most 1,100 times as much as it takes
MOST_PACKED = 1100  # by deflate 1,032
MAX_CHUNK_BYTES = 1 << 28  # of a waveform: to read any of it, HDF5 unpacks a whole chunk


@dataclass(frozen=True)
class WaveformPack(Dataset):
    """Clips whose waveforms lie in one HDF5 file, read row by row."""

    rate: int = PANNS_RATE

    of_files = False

    def is_there(self, row: int) -> bool:
        return True

    def source(self, row: int) -> PackClip:
        return PackClip(str(self.root), self.source_row(row), self.rate)


def recognise(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except OSError:
        return False


def read(path: Path, *, labels: Path | None = None) -> WaveformPack:
    """All clips of a pack. Class names are those of a class_labels_indices.csv beside it or given, else numbers."""
    if path.is_file():
        look_apart(path, (*NEEDED, *OPTIONAL))
    with _opened(path) as pack:
        try:
            missing = [name for name in NEEDED if name not in pack]
            if missing:
                raise UsageError(f"{path} has no {missing[0]!r}; it holds {', '.join(pack) or 'nothing'}")
            names = [_name(value, path) for value in _whole(pack, "audio_name", path)]
            rate, said = _rate(pack, path)
            _check_waveform(pack["waveform"], len(names), path)
            target = _whole(pack, "target", path) if "target" in pack else np.zeros((len(names), 0))
            fold = _whole(pack, "fold", path) if "fold" in pack else np.zeros(len(names))
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            problem = " ".join(str(error).split())
            raise UsageError(f"{path} cannot be read as a pack of waveforms: {problem}") from error
    _check_columns(target, fold, len(names), path)
    class_names, more = _class_names(path, target.shape[1], labels)
    folds, renumbered = from_one(fold.astype(int).tolist())
    clips = tuple(
        Clip(name, file, tuple(np.flatnonzero(row).tolist()), number)
        for name, file, row, number in zip(unique_ids(names), names, target, folds, strict=True)
    )
    if len({clip.id for clip in clips}) != len(clips):
        raise UsageError(f"{path} has the same name twice in audio_name")
    return WaveformPack(path.stem, path, clips, class_names, notes=(*said, *more, *renumbered), rate=rate)


def _opened(path: Path) -> h5py.File:
    import h5py

    try:
        return h5py.File(path, "r")
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} is not a readable HDF5 file: {' '.join(str(error).split())}") from error


def _whole(pack: h5py.File, name: str, path: Path) -> np.ndarray:
    """All of a dataset. Raises UsageError where it declares more than the file can hold: HDF5 would fill memory."""
    dataset = pack[name]
    held = max(UNPACKED, MOST_PACKED * dataset.id.get_storage_size())
    chunk = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
    if dataset.nbytes > held or chunk > max(UNPACKED, 2 * dataset.nbytes):
        raise UsageError(f"{path}: {name} is {dataset.shape} of {dataset.dtype}, more than the file holds")
    return dataset[:]


def _name(value: object, path: Path) -> str:
    name = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
    if not isinstance(name, str) or not name or len(name) > 1024:
        shown = " ".join(repr(value)[:60].split())
        raise UsageError(f"{path}: audio_name holds {shown}, which is no name")
    return as_text(name.replace("\0", ""))


def _rate(pack: h5py.File, path: Path) -> tuple[int, list[str]]:
    for place in (pack, pack["waveform"]):
        if "sample_rate" in place.attrs:
            stored = place.attrs.get_id("sample_rate")
            if stored.dtype.kind not in "iuf" or math.prod(stored.shape) != 1:
                raise UsageError(f"{path}: sample_rate is {stored.shape} of {stored.dtype}; give one number in Hz")
            rate = int(np.ravel(place.attrs["sample_rate"])[0])
            if not 1000 <= rate <= 768_000:
                raise UsageError(f"{path}: sample_rate is {rate}; give 1000 to 768000 Hz")
            return rate, []
    return PANNS_RATE, [notes.PACK_RATE(pack=path, rate=PANNS_RATE)]


def _check_waveform(waveform: h5py.Dataset, clips: int, path: Path) -> None:
    if waveform.ndim != 2 or len(waveform) != clips or waveform.dtype.kind not in "if":
        raise UsageError(
            f"{path}: waveform is {waveform.shape} of {waveform.dtype}; {clips} names need ({clips}, samples) of int16 "
            "or floating point"
        )
    if math.prod(waveform.chunks or (0,)) * waveform.dtype.itemsize > MAX_CHUNK_BYTES:
        raise UsageError(f"{path}: waveform is packed in chunks of {waveform.chunks}; make them smaller")
    if waveform.dtype.kind == "i" and waveform.dtype.itemsize != 2:
        raise UsageError(f"{path}: waveform is {waveform.dtype}; whole numbers must be int16")


def _check_columns(target: np.ndarray, fold: np.ndarray, clips: int, path: Path) -> None:
    if target.ndim != 2 or len(target) != clips or target.dtype.kind not in "biuf":
        raise UsageError(f"{path}: target is {target.shape} of {target.dtype}; give ({clips}, classes) of 0 and 1")
    if fold.shape != (clips,) or fold.dtype.kind not in "iuf" or not ((fold >= 0) & (fold <= MAX_FOLD)).all():
        raise UsageError(f"{path}: fold is {fold.shape} of {fold.dtype}; give a whole number for each of {clips} clips")


def _class_names(path: Path, classes: int, given: Path | None) -> tuple[tuple[str, ...], list[str]]:
    said: list[str] = []
    listed = classes_beside(path, given, said) if classes else None
    if listed is None:
        said = [notes.PACK_CLASSES(pack=path)] if classes else []
        return tuple(f"class {number}" for number in range(classes)), said
    if len(listed.names) != classes:
        raise UsageError(f"{path} has {classes} classes in target, {listed.path} names {len(listed.names)}")
    return listed.names, said
