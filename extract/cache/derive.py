"""Caches made of caches: `merge`, several into one; `select`, a part of one, with fewer clips, layers or bits.

Both write like `extract`: kill them anywhere, and the same command continues.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from whisper_at_cli import __version__
from whisper_at_cli.extract.cache.gather import Origins, fill_shard
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import DEFAULT_SHARD_MB, CacheSpec, ClipTable, Status, shard_count
from whisper_at_cli.extract.cache.store import location
from whisper_at_cli.extract.cache.writer import CacheWriter
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.extract.texts import first_repeated, joined, text_column

NAMED = 5  # clips or classes that a message names


@dataclass(frozen=True)
class DeriveReport:
    """What a new cache holds."""

    cache: str
    clips: int
    written: int  # clips that were not there yet, of a run that was stopped
    done: int
    failed: int
    left_out: int  # clips that were still pending
    layers: int
    dtype: str
    bytes: int


def merge(
    caches: Sequence[str | Path], out: str | Path, *, skip_pending: bool = False, progress: Progress | None = None
) -> DeriveReport:
    """Put the clips of several caches into a new one, in their order; classes are joined by name.

    Raises UsageError where a clip's id is in two of them or fewer than two are given, CacheError where they were made
    with different settings, or hold pending clips that are not to be skipped.
    """
    if len(caches) < 2:
        raise UsageError(f"merge joins two caches or more; {len(caches)} was given")
    opened = tuple(FeatureCache.open(path) for path in caches)
    names = tuple(dict.fromkeys(name for cache in opened for name in cache.spec.class_names))
    datasets = list(dict.fromkeys(cache.spec.dataset for cache in opened))
    spec = replace(opened[0].spec, class_names=names, dataset="+".join(datasets))
    for cache in opened[1:]:
        if differences := opened[0].spec.differences(replace(cache.spec, class_names=opened[0].spec.class_names)):
            raise CacheError(
                f"{opened[0].path} and {cache.path} were made with other settings ({'; '.join(differences)}); only "
                "caches of one backbone and one setting can be merged"
            )
    rows = [_finished(cache, skip_pending) for cache in opened]
    tables = [_table(cache, some, names) for cache, some in zip(opened, rows, strict=True)]
    table = _stacked(tables, opened)
    origins = Origins(opened, np.repeat(np.arange(len(opened)), [len(some) for some in rows]), np.concatenate(rows))
    left_out = sum(map(len, opened)) - len(table)
    per_shard = opened[0].clips_per_shard
    made = _made(["merge", *map(str, caches), str(out), *["--skip-pending"] * skip_pending], opened)
    return _derive(out, spec, table, origins, made, per_shard, left_out, progress)


def select(
    cache: str | Path, out: str | Path, *, splits: Sequence[str] = (), classes: Sequence[str] = (),
    layers: Sequence[int] | None = None, dtype: str | None = None, skip_pending: bool = False,
    progress: Progress | None = None,
) -> DeriveReport:  # fmt: skip
    """Put a part of a cache into a new one: clips of these splits and of any of these classes, which alone are kept as
    labels; these layers, which keep their numbers; in this storage type. What is not asked for stays as it is.

    Raises UsageError where the cache has no such split, class or layer, or no clip is left; CacheError where it holds
    pending clips that are not to be skipped, or values that the storage type cannot hold.
    """
    opened = FeatureCache.open(cache)
    wanted = _in_splits(opened, splits) & _in_classes(opened, classes)
    rows = _finished(opened, skip_pending, wanted)
    if not len(rows):
        raise UsageError(f"no clip of {opened.path} is in this selection; choose other splits or classes")
    names = tuple(name for name in opened.spec.class_names if not classes or name in classes)
    numbers = _layers(opened, layers)
    spec = replace(
        opened.spec, class_names=names, dtype=dtype or opened.spec.dtype, layers=len(numbers),
        layer_numbers=opened.spec.layer_numbers if numbers == opened.layer_numbers else numbers,
    )  # fmt: skip
    same = (spec.dtype, spec.layers) == (opened.spec.dtype, opened.spec.layers)
    per_shard = opened.clips_per_shard if same else spec.clips_per_shard(DEFAULT_SHARD_MB, len(rows))
    asked = [word for name in splits for word in ("--split", name)]
    asked += [word for name in classes for word in ("--class", name)]
    asked += ["--layers", ",".join(map(str, layers))] if layers else []
    asked += (["--dtype", dtype] if dtype else []) + ["--skip-pending"] * skip_pending
    made = _made(["select", str(cache), str(out), *asked], (opened,))
    left_out = int((wanted & (opened.status == Status.PENDING)).sum())
    table = _table(opened, rows, names)
    return _derive(out, spec, table, Origins.one(opened, rows), made, per_shard, left_out, progress)


def _derive(
    out: str | Path, spec: CacheSpec, table: ClipTable, origins: Origins, made: dict, per_shard: int, left_out: int,
    progress: Progress | None,
) -> DeriveReport:  # fmt: skip
    """Write the new cache, or what of it is not there yet."""
    if any(str(location(out)) == str(cache.path) for cache in origins.caches):
        raise UsageError(f"{out} is one of the caches to read; give the new cache another path")
    written = 0
    with CacheWriter.create(out, spec, table, clips_per_shard=per_shard, provenance=made) as writer:
        for shard in range(shard_count(len(table), writer.clips_per_shard)):
            if (writer.cache.status[np.array(writer.rows(shard))] == Status.PENDING).any():
                fill_shard(writer, shard, origins)
                written += len(writer.rows(shard))
            if progress:
                progress(writer.rows(shard).stop, len(table), "")
    status = writer.cache.status
    return DeriveReport(
        cache=str(out), clips=len(table), written=written, done=int((status == Status.DONE).sum()),
        failed=int((status == Status.FAILED).sum()), left_out=left_out, layers=spec.layers, dtype=spec.dtype,
        bytes=sum(writer.store.sizes().values()),
    )  # fmt: skip


def _finished(cache: FeatureCache, skip_pending: bool, wanted: np.ndarray | None = None) -> np.ndarray:
    """Rows that are done or failed, of those that are wanted."""
    wanted = np.ones(len(cache), dtype=bool) if wanted is None else wanted
    pending = int((wanted & (cache.status == Status.PENDING)).sum())
    if pending and not skip_pending:
        raise CacheError(
            f"{cache.path} is not complete: {pending} clips are pending. Finish it with `extract`, or leave them out "
            "with --skip-pending"
        )
    return np.flatnonzero(wanted & (cache.status != Status.PENDING))


def _in_splits(cache: FeatureCache, splits: Sequence[str]) -> np.ndarray:
    """(N,) bool."""
    if not splits:
        return np.ones(len(cache), dtype=bool)
    held = set(cache.split.tolist())
    if unknown := [name for name in splits if name not in held]:
        there = ", ".join(sorted(name for name in held if name)) or "none"
        raise UsageError(f"{cache.path} has no split {unknown[0]!r}; its splits: {there}")
    return np.isin(np.asarray(cache.split, dtype=object), list(splits))


def _in_classes(cache: FeatureCache, classes: Sequence[str]) -> np.ndarray:
    """(N,) bool: clips with any of these labels."""
    if not classes:
        return np.ones(len(cache), dtype=bool)
    names = cache.spec.class_names
    if unknown := [name for name in classes if name not in names]:
        there = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        raise UsageError(f"{cache.path} has no class {unknown[0]!r}; its classes: {there or 'none'}")
    return np.asarray(cache.labels[:, [names.index(name) for name in classes]].any(axis=1))


def _layers(cache: FeatureCache, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The numbers of the layers to keep, in order."""
    if layers is None:
        return cache.layer_numbers
    for number in layers:
        cache._layer_index(number)
    return tuple(sorted(set(layers)))


def _table(cache: FeatureCache, rows: np.ndarray, names: tuple[str, ...]) -> ClipTable:
    """What a cache says of these rows, with labels for classes of these names."""
    labels = np.zeros((len(rows), len(names)), dtype=np.uint8)
    for column, name in enumerate(names):
        if name in cache.spec.class_names:
            labels[:, column] = cache.labels[rows, cache.spec.class_names.index(name)]
    digests = np.zeros(len(rows), np.uint64) if cache.digests is None else cache.digests[rows]
    return ClipTable(
        text_column(cache.ids[rows]), text_column(cache.paths[rows]), cache.fold[rows], cache.split[rows], labels,
        digests,
    )  # fmt: skip


def _stacked(tables: Sequence[ClipTable], caches: Sequence[FeatureCache]) -> ClipTable:
    """One table of all clips. Raises UsageError where an id is in two of them."""
    ids = joined([table.ids for table in tables])
    if twice := first_repeated(ids):
        of = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        first, second = (caches[of[row]].path for row in (twice[1], twice[0]))
        raise UsageError(
            f"both {first} and {second} have a clip {ids[twice[0]]!s}; ids must be unique in a cache. Extract "
            "one of the datasets with other ids"
        )
    return ClipTable(
        ids, joined([table.paths for table in tables]), np.concatenate([table.fold for table in tables]),
        np.concatenate([np.asarray(table.split, dtype=object) for table in tables]),
        np.concatenate([np.asarray(table.labels) for table in tables]),
        np.concatenate([table.digests for table in tables]),
    )  # fmt: skip


def _made(command: Sequence[str], caches: Sequence[FeatureCache]) -> dict:
    """The record of how the cache was made, and of how its sources were."""
    return {
        "tool_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["whisper-at-cli", *command]),
        "sources": [{"cache": str(cache.path), "made": cache.attributes.get("made", {})} for cache in caches],
    }
