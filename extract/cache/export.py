"""Features out of a cache: a folder with one npz per clip, as the original project has them, or one HDF5 file.

An npz folder holds, for each finished clip, `ID.npz` with the array `arr_0` (layers, 25, channels); beside them
`labels.csv`, which says what the clips are, and `cache.json`, which says what made them. import_npz.py reads it back.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.extract.progress import Progress

KEY = "arr_0"
LABELS_CSV, SETTINGS_JSON = "labels.csv", "cache.json"
COLUMNS = ("id", "file", "path", "fold", "split", "valid_frames", "labels")
SEPARATOR = ";"  # between the class names of one clip
UNSAFE = re.compile(r'[%/\\:*?"<>|\x00-\x1f\x7f]|^\.')  # in a file name, on one system or another
NAME_BYTES = 240  # of a file name, suffix not counted; most systems allow 255 with it
WRITE_BYTES = 32 << 20  # of features handed to HDF5 at once


@dataclass(frozen=True)
class ExportReport:
    """`clips` are in the cache, `written` were finished and are in `out`, `skipped` failed or are pending."""

    clips: int
    written: int
    skipped: int
    out: str


def export_npz(cache_path: str | Path, out_folder: str | Path, *, progress: Progress | None = None) -> ExportReport:
    """One uncompressed npz per finished clip, (L, T, D) float16 or float32; the folder appears whole or not at all.

    Raises UsageError where the folder holds something already, CacheError where the cache is damaged.
    """
    cache, rows = _finished(cache_path)
    unfit = next((name for name in cache.spec.class_names if SEPARATOR in name or name.strip() != name), None)
    if unfit is not None:
        raise UsageError(
            f"class name {unfit!r} of {cache_path} cannot stand in {LABELS_CSV}, where {SEPARATOR!r} separates names; "
            "export to HDF5 instead (--format hdf5)"
        )
    files = [f"{name}.npz" for name in _file_names(cache.ids[rows].tolist())]
    with _appearing_whole(Path(out_folder)) as folder:
        folder.mkdir()
        for done, (row, file) in enumerate(zip(rows.tolist(), files, strict=True), start=1):
            np.savez(folder / file, **{KEY: cache.features([row])[0]})
            if progress:
                progress(done, len(rows))
        _write_labels(folder / LABELS_CSV, cache, rows, files)
        (folder / SETTINGS_JSON).write_text(json.dumps(cache.attributes, indent=1) + "\n")
    return ExportReport(len(cache), len(rows), len(cache) - len(rows), str(out_folder))


def export_hdf5(cache_path: str | Path, out_file: str | Path, *, progress: Progress | None = None) -> ExportReport:
    """One HDF5 file of the finished clips, with a dimension scale for each dimension; it appears whole or not at all.

    features (n, L, T, D), mean (n, L, D) float32, labels (n, C), id, path, split, fold, valid_frames (n,). The scales:
    `clip` is the row in the cache, from 0; `layer` counts from 1; `class` holds the class names.
    """
    import h5py

    cache, rows = _finished(cache_path)
    with _appearing_whole(Path(out_file)) as temporary, h5py.File(temporary, "w", libver=("v108", "v108")) as file:
        for name, value in cache.attributes.items():
            file.attrs[name] = value if isinstance(value, str | int | float) else json.dumps(value)
        _add_scales(file, cache, rows)
        _add(file, "id", ("clip",), cache.ids[rows])
        _add(file, "path", ("clip",), cache.paths[rows])
        _add(file, "split", ("clip",), cache.split[rows])
        _add(file, "fold", ("clip",), cache.fold[rows])
        _add(file, "valid_frames", ("clip",), cache.valid_frames[rows])
        if cache.spec.class_names:
            _add(file, "labels", ("clip", "class"), cache.labels[rows])
        _add_features(file, cache, rows, progress)
    return ExportReport(len(cache), len(rows), len(cache) - len(rows), str(out_file))


def _finished(cache_path: str | Path) -> tuple[FeatureCache, np.ndarray]:
    """A cache and the rows of its finished clips, at least one."""
    cache = FeatureCache.open(cache_path)
    rows = np.flatnonzero(cache.done)
    if not len(rows):
        raise CacheError(f"none of the {len(cache)} clips of {cache_path} is finished; extract them first")
    return cache, rows


@contextlib.contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """A temporary name beside `out` for a file or folder, renamed to `out` at the end and removed on any error."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already; remove it or choose another place to export to")
    absolute = Path(os.path.abspath(out))
    temporary = absolute.with_name(f".{absolute.name}.partial")
    _remove(temporary)  # what a killed run left
    try:
        absolute.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, absolute)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise CacheError(f"cannot write {out}: {reason}; make room or choose another place") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _file_names(ids: list[str]) -> list[str]:
    """A file name for each id: the id itself wherever that can be, never the same for two, not even in upper case.

    What a file name cannot hold is written %XX. Names that are too long, or that differ in case alone, end in %sha and
    a hash of the id, which no other name does, since % itself is written %25.
    """
    names = [UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", name) for name in ids]
    folded = Counter(name.casefold() for name in names)
    for at, name in enumerate(names):
        if folded[name.casefold()] > 1 or len(name.encode()) > NAME_BYTES:
            names[at] = f"{name[:48]}%sha{hashlib.sha256(ids[at].encode()).hexdigest()[:32]}"
    return names


def _write_labels(path: Path, cache: FeatureCache, rows: np.ndarray, files: list[str]) -> None:
    names = np.array(cache.spec.class_names, dtype=object)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row, name in zip(rows.tolist(), files, strict=True):
            labels = SEPARATOR.join(names[np.flatnonzero(cache.labels[row])])
            fold, frames = cache.fold[row], cache.valid_frames[row]
            writer.writerow([cache.ids[row], name, cache.paths[row], fold, cache.split[row], frames, labels])


def _add(file, name: str, dims: tuple[str, ...], values: np.ndarray | None = None, **options):
    """A dataset whose dimensions have names and the scales of those names."""
    if values is not None and values.dtype.kind in "UO":
        import h5py

        dataset = file.create_dataset(name, data=values.astype(object), dtype=h5py.string_dtype())
    else:
        dataset = file.create_dataset(name, data=values, **options)
    for axis, dim in zip(dataset.dims, dims, strict=True):
        axis.label = dim
        axis.attach_scale(file[dim])
    return dataset


def _add_scales(file, cache: FeatureCache, rows: np.ndarray) -> None:
    spec = cache.spec
    scales = {
        "clip": rows, "layer": np.arange(1, spec.layers + 1), "frame": np.arange(spec.frames),
        "channel": np.arange(spec.dim),
    }  # fmt: skip
    for name, values in scales.items():
        file[name] = values
    if spec.class_names:
        file["class"] = list(spec.class_names)
        scales["class"] = spec.class_names
    for name in scales:
        file[name].make_scale(name)


def _add_features(file, cache: FeatureCache, rows: np.ndarray, progress: Progress | None) -> None:
    L, T, D = cache.spec.layers, cache.spec.frames, cache.spec.dim
    dtype = "float16" if cache.spec.dtype == "float16" else "float32"
    features = _add(
        file, "features", ("clip", "layer", "frame", "channel"), shape=(len(rows), L, T, D), dtype=dtype,
        chunks=(1, 1, T, D),
    )  # fmt: skip
    mean = _add(file, "mean", ("clip", "layer", "channel"), shape=(len(rows), L, D), dtype="float32", chunks=(1, L, D))
    step = max(1, WRITE_BYTES // (L * T * D * features.dtype.itemsize))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        features[start : start + len(some)] = cache.features(some)
        mean[start : start + len(some)] = cache.mean(rows=some)
        if progress:
            progress(start + len(some), len(rows))
