"""Reading a whole cache back: every chunk's checksum, every value finite, every shard there."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache import schema
from whisper_at_cli.extract.cache.layout import SHARDED
from whisper_at_cli.extract.cache.metadata import METADATA, metadata_problems
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import Status, array_shapes, named_axes
from whisper_at_cli.extract.errors import CacheError, UsageError, WhisperATError
from whisper_at_cli.extract.machine import cores
from whisper_at_cli.extract.progress import Progress

COLUMNS = {  # in the cache: in a FeatureCache
    "id": "ids", "path": "paths", "split": "split", "error": "errors", "fold": "fold", "labels": "labels",
    "digest": "digests",
}  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong: in which shard (-1: none of them), which of its clips it hits, and what was found."""

    shard: int
    clips: tuple[str, ...]
    problem: str


@dataclass(frozen=True)
class VerifyReport:
    """`ok` means that every clip that is marked done, or that was drawn of them, was read back whole."""

    ok: bool
    clips_read: int
    damaged: tuple[Damage, ...]
    clips_done: int = 0  # that are marked done


def verify(
    path: str | Path, *, rows: np.ndarray | None = None, sample: float = 1.0, seed: int = 0,
    workers: int | None = None, progress: Progress | None = None,
) -> VerifyReport:  # fmt: skip
    """Read back every finished clip of a cache, those in `rows`, (N,) bool, or a share of them that is drawn.

    What is known of the clips (columns, metadata, status) is read whole in any case. Shards are read by `workers`
    threads, by default one for each core. Raises UsageError or CacheError where the cache cannot even be opened.
    """
    if not 0 < sample <= 1:
        raise UsageError(f"the sample must be above 0 and at most 1 (got {sample:g})")
    cache = FeatureCache.open(path)
    damaged = _metadata_damage(cache) + [Damage(-1, (), problem) for problem in column_problems(cache).values()]
    damaged += _status_damage(cache)
    asked = np.ones(len(cache), dtype=bool) if rows is None else rows
    done = all_done = np.flatnonzero(cache.done & asked)
    if sample < 1:
        drawn = np.random.default_rng(seed).choice(len(done), size=math.ceil(sample * len(done)), replace=False)
        done = np.sort(done[drawn])
    for read, found in _read_shards(cache, done, workers or cores()):
        damaged += found
        if progress:
            progress(read, len(done), f"{len(damaged)} damaged" if damaged else "")
    damaged += _empty_shard_damage(cache, np.flatnonzero((cache.status == Status.FAILED) & asked), all_done)
    return VerifyReport(not damaged, len(done), tuple(damaged), len(all_done))


def _read_shards(cache: FeatureCache, done: np.ndarray, workers: int) -> Iterator[tuple[int, list[Damage]]]:
    """Clips that were read so far, and what is wrong with the last shard of them; shards come in order."""
    shards, first = np.unique(done // cache.clips_per_shard, return_index=True)
    parts = deque(zip(shards.tolist(), np.split(done, first[1:]), strict=len(done) > 0))
    waiting: deque[tuple[int, Future]] = deque()
    read = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        while parts or waiting:
            while parts and len(waiting) < 2 * workers:
                shard, rows = parts.popleft()
                waiting.append((len(rows), pool.submit(_shard_damage, cache, shard, rows)))
            clips, damage = waiting.popleft()
            read += clips
            yield read, damage.result()


def _metadata_damage(cache: FeatureCache) -> list[Damage]:
    """Arrays that zarr and xarray would not open as designed, because of their metadata."""
    import zarr

    found = metadata_problems(cache.store)
    shapes = array_shapes(cache.spec, len(cache), version=cache.layout.version, digests=cache.has_digests)
    for name, (shape, dtype) in shapes.items():
        if f"{name}/{METADATA}" in found:
            continue
        try:
            with cache.store.asking(name):
                array = zarr.open_array(cache.store.zarr(), path=name, mode="r", zarr_format=3)
            if array.shape != shape or (dtype and array.dtype != dtype):
                found[name] = f"{name}/{METADATA} says {array.shape} {array.dtype}, not {shape} {dtype}"
        except WhisperATError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever damaged bytes bring zarr to
            found[name] = f"{name}/{METADATA} is missing or damaged: {error}"
    return [Damage(-1, (), problem) for problem in found.values()]


def column_problems(cache: FeatureCache) -> dict[str, str]:
    """What is wrong with each column that is missing or damaged, by its name in the cache."""
    found = {}
    newer = cache.layout.version > 1
    for name, attribute in COLUMNS.items():
        if newer and name == "error":  # made of the log
            continue
        try:
            getattr(cache, attribute)
        except CacheError as error:
            found[name] = str(error)
    for name in named_axes(cache.spec) if newer else ():
        try:
            cache.check_axis(name)
        except CacheError as error:
            found[name] = str(error)
    return found


def _names(cache: FeatureCache, rows: Iterable[int]) -> tuple[str, ...]:
    """The ids of these clips; their numbers where no id can be read any more."""
    try:
        return tuple(str(cache.ids[row]) for row in rows)
    except CacheError:
        return tuple(f"row {row}" for row in rows)


def _status_damage(cache: FeatureCache) -> list[Damage]:
    """Where it is no longer known which clips are done, or how much of them is real."""
    S, N = cache.clips_per_shard, len(cache)
    return [
        Damage(shard, _names(cache, schema.shard_rows(shard, S, N) if shard >= 0 else ()), problem)
        for shard, problem in cache.clip_status.all_problems()
    ]


def _shard_damage(cache: FeatureCache, shard: int, rows: np.ndarray) -> list[Damage]:
    """What is wrong with one shard. A damage that hits all its clips alike is named once."""
    names = _names(cache, rows)
    try:
        means_are_finite = bool(np.isfinite(cache.mean(rows=rows)).all())
    except CacheError as error:
        return [Damage(shard, names, str(error))]
    found = [] if means_are_finite else [Damage(shard, names, "mean holds a value that is not finite")]
    problems = cache.store.map(lambda row: _clip_problem(cache, row), rows.tolist())
    found += [Damage(shard, (name,), problem) for name, problem in zip(names, problems, strict=True) if problem]
    if len(found) == len(rows) > 1 and len({damage.problem for damage in found}) == 1:
        return [Damage(shard, names, found[0].problem)]
    return found


def _empty_shard_damage(cache: FeatureCache, failed: np.ndarray, done: np.ndarray) -> list[Damage]:
    """Shards of which every clip failed: they hold but an index, without which Zarr reads none of the array."""
    S, found = cache.clips_per_shard, []
    for shard in np.setdiff1d(failed // S, done // S).tolist():
        names = _names(cache, failed[failed // S == shard])
        for array in SHARDED[: 3 if cache.spec.dtype == "int8" else 2]:
            try:
                if cache.store.exists(cache.layout.file(array, shard)):
                    cache._shard(array, shard).check([])
            except CacheError as error:
                found.append(Damage(shard, names, str(error)))
    return found


def _clip_problem(cache: FeatureCache, row: int) -> str:
    """What is wrong with one clip's features, or nothing."""
    try:
        features = cache.features([row])
    except CacheError as error:
        return str(error)
    return "" if np.isfinite(features).all() else "features hold a value that is not finite"
