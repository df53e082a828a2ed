"""Features out of a cache and into one: a folder with one npz per clip, as the original project has them, and HDF5.

An npz folder holds, for each finished clip, `ID.npz` with the array `arr_0` (layers, 25, channels); beside them
`labels.csv`, which says what the clips are, and `cache.json`, which says what made them. `import_npz` reads all three
back, and needs none but the npz files.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_at_cli import __version__
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import DEFAULT_SHARD_MB, FRAMES, CacheSpec, ClipTable, Status
from whisper_at_cli.extract.cache.writer import CacheWriter, ShardBlock
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.extract.progress import Progress

if TYPE_CHECKING:
    import h5py

KEY = "arr_0"
LABELS_CSV, SETTINGS_JSON = "labels.csv", "cache.json"
COLUMNS = ("id", "file", "path", "fold", "split", "valid_frames", "labels")
SEPARATOR = ";"  # between the class names of one clip
UNSAFE = re.compile(r'[%/\\:*?"<>|\x00-\x1f\x7f]|^\.')  # in a file name, on one system or another
NAME_BYTES = 240  # of a file name, suffix not counted; most systems allow 255 with it
SHAPE_SAMPLES = 32  # files that decide which shape a folder has
WRITE_BYTES = 32 << 20  # of features handed to HDF5 at once
NAMED = 3  # clips that a warning names


@dataclass(frozen=True)
class ExportReport:
    """`clips` are in the cache, `written` were finished and are in `out`, `skipped` failed or are pending."""

    clips: int
    written: int
    skipped: int
    out: str


@dataclass(frozen=True)
class ImportReport:
    """`written`, `skipped` (they were there) and `failed` add up to `clips`."""

    cache: str
    clips: int
    written: int
    skipped: int
    failed: int
    failures: tuple[dict, ...]  # id, path and error of each clip that failed
    warnings: tuple[str, ...]


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


def import_npz(
    folder: str | Path, cache_path: str | Path, *, labels_csv: str | Path | None = None, backbone: str | None = None,
    clip_seconds: float | None = None, dtype: str | None = None, class_names: tuple[str, ...] | None = None,
    shard_mb: float = DEFAULT_SHARD_MB, progress: Progress | None = None,
) -> ImportReport:  # fmt: skip
    """A folder with one npz per clip into a cache. The same call continues one that was stopped, failed clips included.

    `labels_csv` has a column id, optionally file, path, fold, split, valid_frames, and label or labels (separated by
    ';'); by default it is the folder's labels.csv, and without one the clips have no labels. `backbone`,
    `clip_seconds`, `dtype` and `class_names` are by default what the folder's cache.json says; without it float16, and
    the names that the CSV has, in alphabetical order. A file that is damaged, of another shape than most, or not
    finite makes its clip fail, with the reason; the others go on.
    """
    folder = Path(folder)
    files, settings = _npz_files(folder), _read_settings(folder)
    listed, names, warnings = _listed_clips(folder, files, labels_csv, class_names, settings.get("class_names"))
    shape = _common_shape([files[clip.file] for clip in listed])
    given = {"backbone": backbone, "clip_seconds": clip_seconds, "dtype": dtype}
    spec = _spec(folder, settings, {name: value for name, value in given.items() if value is not None}, shape, names)
    made = {
        "tool_version": __version__,
        "imported_from": str(folder.resolve()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    with CacheWriter.create(cache_path, spec, _clip_table(listed, names), shard_mb=shard_mb, provenance=made) as writer:
        there = int(writer.cache.done.sum())
        _fill_shards(writer, listed, files, shape, progress)
        return _import_report(writer, there, warnings)


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
        temporary.replace(absolute)
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


def _add(
    file: h5py.File, name: str, dims: tuple[str, ...], values: np.ndarray | None = None, **options: Any
) -> h5py.Dataset:
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


def _add_scales(file: h5py.File, cache: FeatureCache, rows: np.ndarray) -> None:
    spec = cache.spec
    scales = {
        "clip": rows, "layer": np.arange(1, spec.layers + 1), "frame": np.arange(spec.frames),
        "channel": np.arange(spec.dim),
    }  # fmt: skip
    for name, values in scales.items():
        file[name] = values
    if spec.class_names:
        file["class"] = list(spec.class_names)
        scales["class"] = np.array(spec.class_names)
    for name in scales:
        file[name].make_scale(name)


def _add_features(file: h5py.File, cache: FeatureCache, rows: np.ndarray, progress: Progress | None) -> None:
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


@dataclass(frozen=True)
class _ListedClip:
    """One clip to be imported: its file's name in the folder, and what the CSV says of it."""

    id: str
    file: str
    path: str
    fold: int = 0
    split: str = ""
    valid_frames: int = FRAMES
    labels: tuple[str, ...] = ()


def _npz_files(folder: Path) -> dict[str, Path]:
    """Path of every npz file below a folder, by its name in there, in alphabetical order."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the one that holds an npz file per clip")
    found = sorted(path for path in folder.rglob("*.npz") if not path.name.startswith("."))
    if not found:
        raise UsageError(f"{folder} holds no .npz files; give the folder that holds one per clip")
    return {path.relative_to(folder).as_posix(): path for path in found}


def _read_settings(folder: Path) -> dict:
    """What an export wrote about its cache; empty where there is none."""
    path = folder / SETTINGS_JSON
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it and say what made the features by options") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path} was not written by an export; remove it and say what made the features by options")
    return settings


def _spec(folder: Path, exported: dict, given: dict, shape: tuple[int, int, int], names: tuple[str, ...]) -> CacheSpec:
    """What made the features: as given, else as the export says. Weights and precision go with the backbone."""
    if given.get("backbone", exported.get("backbone")) != exported.get("backbone"):
        exported = {name: value for name, value in exported.items() if name not in ("weights_sha256", "precision")}
    settings = {"dtype": "float16", "weights_sha256": "unknown", "precision": "unknown"} | exported | given
    for name in ("backbone", "clip_seconds"):
        if name not in settings:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"no {SETTINGS_JSON} in {folder} says what made its features; give {option}")
    layers, frames, dim = shape
    return CacheSpec(
        backbone=settings["backbone"], weights_sha256=settings["weights_sha256"], layers=layers, dim=dim, frames=frames,
        clip_seconds=_positive(settings["clip_seconds"]), dtype=settings["dtype"], precision=settings["precision"],
        dataset=settings.get("dataset", folder.resolve().name), class_names=names,
    )  # fmt: skip


def _positive(clip_seconds: float) -> float:
    if not 0 < clip_seconds < math.inf:
        raise UsageError(f"clips of {clip_seconds} seconds cannot be; give the length of the clips that were encoded")
    return float(clip_seconds)


def _listed_clips(
    folder: Path, files: dict[str, Path], labels_csv: str | Path | None, given: tuple[str, ...] | None,
    exported: list[str] | None,
) -> tuple[list[_ListedClip], tuple[str, ...], list[str]]:  # fmt: skip
    """The clips that have a file (and a row, where there is a CSV), the class names, and warnings of those left out."""
    if labels_csv is None and not (folder / LABELS_CSV).exists():
        if given:
            raise UsageError(f"class names were given, but no CSV says which clip of {folder} has which; give --labels")
        return [_ListedClip(name.removesuffix(".npz"), name, name) for name in files], (), []
    path = Path(labels_csv) if labels_csv is not None else folder / LABELS_CSV
    listed, labelled = _read_labels(path)
    here = [clip for clip in listed if clip.file in files]
    if not here:
        asked = f"its first row asks for {listed[0].file!r}" if listed else "it has no rows"
        raise UsageError(
            f"{path} names no file of {folder}: {asked}, and the first file there is {next(iter(files))!r}. An id is "
            "the name of the clip's file without .npz"
        )
    unlisted = files.keys() - {clip.file for clip in listed}
    warnings = _left_out(f"rows of {path} without a file in {folder}", [c.file for c in listed if c.file not in files])
    warnings += _left_out(f"files of {folder} without a row in {path}", sorted(unlisted))
    names = tuple(given if given is not None else exported or sorted({name for clip in here for name in clip.labels}))
    if names and not labelled:
        raise UsageError(f"{path} has neither a column 'labels' nor 'label', but class names are given; add one")
    return here, names, warnings


def _left_out(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {what} were left out: {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"]


def _read_labels(path: Path) -> tuple[list[_ListedClip], bool]:
    """The rows of a CSV, and whether it has a column of labels. Raises UsageError with the line that is wrong."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or ()]
            if "id" not in columns:
                raise UsageError(f"{path} has no column 'id'; its first line names: {', '.join(columns) or 'nothing'}")
            reader.fieldnames = columns
            listed = [_listed_clip(entry, f"{path}, line {reader.line_num}") for entry in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {error}; give a CSV file in UTF-8 with a column 'id'") from error
    return listed, not {"label", "labels"}.isdisjoint(columns)


def _listed_clip(entry: dict, place: str) -> _ListedClip:
    def number(column: str, default: int, largest: int) -> int:
        text = (entry.get(column) or "").strip()
        if text and not (text.isdecimal() and int(text) <= largest):
            raise UsageError(f"{place}: {column} is {text!r}; give a number from 0 to {largest}, or nothing")
        return int(text) if text else default

    name = entry["id"]
    if not name:
        raise UsageError(f"{place}: the id is empty; give the name of the clip's file without .npz")
    file = entry.get("file") or f"{name}.npz"
    labels = (entry.get("labels") or entry.get("label") or "").split(SEPARATOR)
    return _ListedClip(
        id=name, file=file, path=entry.get("path") or file, fold=number("fold", 0, np.iinfo(np.int16).max),
        split=(entry.get("split") or "").strip(), valid_frames=number("valid_frames", FRAMES, FRAMES),
        labels=tuple(label.strip() for label in labels if label.strip()),
    )  # fmt: skip


def _clip_table(listed: list[_ListedClip], names: tuple[str, ...]) -> ClipTable:
    index = {name: at for at, name in enumerate(names)}
    labels = np.zeros((len(listed), len(names)), dtype=np.uint8)
    for row, clip in enumerate(listed):
        for label in clip.labels:
            if label not in index:
                raise UsageError(f"clip {clip.id!r} has the label {label!r}, which is none of the {len(names)} classes")
            labels[row, index[label]] = 1
    return ClipTable(
        ids=np.array([clip.id for clip in listed]), paths=np.array([clip.path for clip in listed]),
        fold=np.array([clip.fold for clip in listed], dtype=np.int16),
        split=np.array([clip.split for clip in listed]), labels=labels,
    )  # fmt: skip


def _common_shape(paths: list[Path]) -> tuple[int, int, int]:
    """The shape that most of some evenly spread files have. Raises UsageError where none of them can be read."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    problem = ""
    for at in np.unique(np.linspace(0, len(paths) - 1, SHAPE_SAMPLES).astype(int)).tolist():
        try:
            shapes[_read_npz(paths[at]).shape] += 1
        except CacheError as error:
            problem = problem or f"{paths[at].name}: {error}"
    if not shapes:
        raise UsageError(f"{paths[0].parent} holds no npz file that can be imported; {problem}")
    return shapes.most_common(1)[0][0]


def _read_npz(path: Path) -> np.ndarray:
    """Features (L, T, D) of one npz file. Raises CacheError with what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{KEY}.npy" not in archive.namelist():
                raise CacheError(f"it holds {', '.join(archive.namelist()) or 'nothing'}, not an array {KEY}")
            data = archive.read(f"{KEY}.npy")  # all of it, so that its checksum is compared
        features = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError, MemoryError) as error:
        raise CacheError(f"not a whole npz file: {error}") from error
    shape, dtype = features.shape, features.dtype
    if len(shape) != 3 or shape[1] != FRAMES or not features.size or dtype.kind != "f":
        raise CacheError(f"{KEY} is {shape} {dtype}, not (layers, {FRAMES}, channels) of floating-point numbers")
    return features


def _fill_shards(
    writer: CacheWriter, listed: list[_ListedClip], files: dict[str, Path], shape: tuple[int, ...],
    progress: Progress | None,
) -> None:  # fmt: skip
    """Read what the cache does not have yet, a shard at a time, its files side by side."""
    from whisper_at_cli.extract.devices import cores

    redo = writer.cache.status != Status.DONE
    failed = 0
    with ThreadPoolExecutor(cores(), thread_name_prefix="read npz") as pool:
        for shard in writer.shards_of(redo):
            rows, block = writer.rows(shard), writer.block(shard, redo)
            todo = [(slot, listed[row]) for slot, row in enumerate(rows) if redo[row]]
            all_read = pool.map(_try_to_read, [files[clip.file] for _, clip in todo])
            for (slot, clip), features in zip(todo, all_read, strict=True):
                block.valid_frames[slot] = clip.valid_frames
                problem = _fill(block, slot, features, shape, writer.spec.dtype)
                if problem:
                    block.errors[slot] = problem
            writer.write(shard, block)
            failed += len(block.errors)
            if progress:
                progress(rows.stop, len(listed), f"{failed} failed" if failed else "")


def _try_to_read(path: Path) -> np.ndarray | str:
    """The features of a file, or what is wrong with it."""
    try:
        return _read_npz(path)
    except CacheError as error:
        return str(error)


def _fill(block: ShardBlock, slot: int, features: np.ndarray | str, shape: tuple[int, ...], dtype: str) -> str:
    """Put one clip into its shard; returns what is wrong with it, or nothing."""
    import torch

    from whisper_at_cli.extract.cache.storage import to_storage

    if isinstance(features, str):
        return features
    if features.shape != shape:
        return f"its shape is {features.shape}, most others' {shape}"
    finite = np.isfinite(features).all(axis=(1, 2))
    if not finite.all():
        return f"layer {int(finite.argmin()) + 1} holds a value that is not finite"
    stored = to_storage(torch.from_numpy(features.astype(np.float32))[None], dtype)
    if not stored.finite.all():
        return f"layer {int(stored.finite[0].int().argmin()) + 1} holds a value too large for {dtype}; use float32"
    block.features[slot], block.mean[slot] = stored.features[0].numpy(), stored.mean[0].numpy()
    if block.scale is not None and stored.scale is not None:
        block.scale[slot] = stored.scale[0].numpy()
    block.status[slot] = Status.DONE
    return ""


def _import_report(writer: CacheWriter, there: int, warnings: list[str]) -> ImportReport:
    cache = FeatureCache.open(writer.path)
    failures = tuple(
        {"id": str(cache.ids[row]), "path": str(cache.paths[row]), "error": str(cache.errors[row])}
        for row in np.flatnonzero(cache.status == Status.FAILED)
    )
    return ImportReport(
        cache=str(writer.path), clips=len(cache), written=int(cache.done.sum()) - there, skipped=there,
        failed=len(failures), failures=failures, warnings=tuple(warnings),
    )  # fmt: skip
