"""Features into a cache from a folder with one npz per clip: what `export` wrote, or the original project.

What the folder's `labels.csv` and `cache.json` say is taken over; none but the npz files is needed.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from whisper_at_cli import __version__
from whisper_at_cli.extract import notes
from whisper_at_cli.extract.ahead import in_order
from whisper_at_cli.extract.cache.export import LABELS_CSV, SEPARATOR, SETTINGS_JSON
from whisper_at_cli.extract.cache.npz import features_file, read_features
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import DEFAULT_SHARD_MB, FRAMES, CacheSpec, ClipTable, Status
from whisper_at_cli.extract.cache.writer import CacheWriter, ShardBlock
from whisper_at_cli.extract.cells import as_fold, as_whole, from_one, is_nan
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.extract.sparse import SparseLabels
from whisper_at_cli.extract.tables import Table
from whisper_at_cli.extract.texts import as_objects, text_column

SHAPE_SAMPLES = 32  # files that decide which shape a folder has
READ_BYTES = 1 << 20
NAMED = 3  # clips that a warning names
LABEL_COLUMNS = ("labels", "label", "category", "class", "target")  # best first
NAN_LABEL = ("nan",)  # as pandas writes an empty cell


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
        "command": shlex.join(sys.argv),
    }
    with CacheWriter.create(cache_path, spec, _clip_table(listed, names), shard_mb=shard_mb, provenance=made) as writer:
        there = int(writer.cache.done.sum())
        _fill_shards(writer, listed, files, shape, progress)
        return _import_report(writer, there, warnings)


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
    listed, labelled, said = _read_labels(path, exported=labels_csv is None and exported is not None)
    here = [clip for clip in listed if clip.file in files]
    if not here:
        asked = f"its first row asks for {listed[0].file!r}" if listed else "it has no rows"
        raise UsageError(
            f"{path} names no file of {folder}: {asked}, and the first file there is {next(iter(files))!r}. An id is "
            "the name of the clip's file without .npz"
        )
    unlisted = files.keys() - {clip.file for clip in listed}
    warnings = said + _left_out(
        f"rows of {path} without a file in {folder}", [c.file for c in listed if c.file not in files]
    )
    warnings += _left_out(f"files of {folder} without a row in {path}", sorted(unlisted))
    names = tuple(given if given is not None else exported or sorted({name for clip in here for name in clip.labels}))
    if names and not labelled:
        raise UsageError(f"{path} has neither a column 'labels' nor 'label', but class names are given; add one")
    return here, names, warnings


def _left_out(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {what} were left out: {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"]


def _read_labels(path: Path, *, exported: bool) -> tuple[list[_ListedClip], bool, list[str]]:
    """The rows of a CSV, whether it has a column of labels, and notes. Raises UsageError with the line that is wrong.

    In a table of our own export, fold 0 is none and nothing else.
    """
    table = Table(path)
    if table.column("id") is None:
        raise UsageError(f"{path} has no column 'id': its columns are {table.described()}")
    label = table.column(*LABEL_COLUMNS)
    rows = list(table.rows())
    given = [as_fold(row.get("fold"), place) for place, row in rows]
    folds, said = from_one(given) if not exported else ([fold or 0 for fold in given], [])
    listed = [_listed_clip(row, place, fold) for (place, row), fold in zip(rows, folds, strict=True)]
    if without := sum(1 for clip in listed if clip.labels == NAN_LABEL):
        said.append(notes.NAN_LABELS(clips=without, table=path.name))
        listed = [replace(clip, labels=()) if clip.labels == NAN_LABEL else clip for clip in listed]
    if label not in (None, "label", "labels"):
        said.append(notes.COLUMNS_TAKEN(table=path.name, taken=f"labels from column {label!r}"))
    return listed, label is not None, [*table.notes, *said]


def _listed_clip(row: dict[str, str], place: str, fold: int) -> _ListedClip:
    name = row["id"]
    if not name:
        raise UsageError(f"{place}: the id is empty; give the name of the clip's file without .npz")
    file = row.get("file") or f"{name}.npz"
    labels = next((row[column] for column in LABEL_COLUMNS if row.get(column)), "").split(SEPARATOR)
    frames = row.get("valid_frames", "")
    return _ListedClip(
        id=name, file=file, path=row.get("path") or file, fold=fold, split=row.get("split", ""),
        valid_frames=as_whole(frames, "valid_frames", place, most=FRAMES) if frames and not is_nan(frames) else FRAMES,
        labels=tuple(label.strip() for label in labels if label.strip()),
    )  # fmt: skip


def _clip_table(listed: list[_ListedClip], names: tuple[str, ...]) -> ClipTable:
    index = {name: at for at, name in enumerate(names)}
    for clip in listed:
        if unknown := next((label for label in clip.labels if label not in index), None):
            raise UsageError(f"clip {clip.id!r} has the label {unknown!r}, which is none of the {len(names)} classes")
    labels = SparseLabels.of([sorted({index[label] for label in clip.labels}) for clip in listed], len(names))
    return ClipTable(
        ids=text_column([clip.id for clip in listed]), paths=text_column([clip.path for clip in listed]),
        fold=np.array([clip.fold for clip in listed], dtype=np.int16), split=as_objects(clip.split for clip in listed),
        labels=labels,
    )  # fmt: skip


def _common_shape(paths: list[Path]) -> tuple[int, int, int]:
    """The shape that most of some evenly spread files have. Raises UsageError where none of them can be read."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    problem = ""
    for at in np.unique(np.linspace(0, len(paths) - 1, SHAPE_SAMPLES).astype(int)).tolist():
        try:
            with features_file(paths[at]) as (file, shape, *_):
                while file.read(READ_BYTES):  # to its end, where its checksum is compared
                    pass
                shapes[shape] += 1
        except CacheError as error:
            problem = problem or f"{paths[at].name}: {error}"
    if not shapes:
        raise UsageError(f"{paths[0].parent} holds no npz file that can be imported; {problem}")
    return shapes.most_common(1)[0][0]


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
            paths = [files[clip.file] for _, clip in todo]
            all_read = in_order(pool, lambda path: _try_to_read(path, shape), paths, ahead=cores())
            for (slot, clip), features in zip(todo, all_read, strict=True):
                block.valid_frames[slot] = clip.valid_frames
                if problem := _fill(block, slot, features, writer.spec.dtype):
                    block.errors[slot] = problem
            writer.write(shard, block)
            failed += len(block.errors)
            if progress:
                progress(rows.stop, len(listed), f"{failed} failed" if failed else "")


def _try_to_read(path: Path, shape: tuple[int, ...]) -> np.ndarray | str:
    """The features of a file, or what is wrong with it."""
    try:
        return read_features(path, shape)
    except CacheError as error:
        return str(error)


def _fill(block: ShardBlock, slot: int, features: np.ndarray | str, dtype: str) -> str:
    """Put one clip into its shard; returns what is wrong with it, or nothing."""
    import torch

    from whisper_at_cli.extract.cache.storage import to_storage

    if isinstance(features, str):
        return features
    finite = np.array([np.isfinite(layer).all() for layer in features])
    if not finite.all():
        return f"layer {int(finite.argmin()) + 1} holds a value that is not finite"
    stored = to_storage(torch.from_numpy(features.astype(np.float32, copy=False))[None], dtype)
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
