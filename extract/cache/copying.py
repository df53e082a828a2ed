"""`copy`: a cache from one place to another, folder or bucket, each checksum checked on the way.

What was copied is noted in `copying/`, so that a copy that was stopped goes on; the group's metadata come last, so
that what is not whole is no cache.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from whisper_at_cli.extract.ahead import in_order
from whisper_at_cli.extract.cache.layout import SHARDED
from whisper_at_cli.extract.cache.locks import running_slots
from whisper_at_cli.extract.cache.metadata import METADATA, metadata_problems
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import shard_count
from whisper_at_cli.extract.cache.shards import check_shard
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore, location
from whisper_at_cli.extract.cache.verify import column_problems
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.extract.progress import Progress

NOTED = "copying"  # folder of the notes on what was copied
FILES_AT_ONCE = 4
FILES_PER_NOTE = 64
LEFT = (f"{NOTED}/", "status/.locks/")  # what is of no use elsewhere


@dataclass(frozen=True)
class CopyReport:
    """What was copied. Files that an earlier run had copied are `skipped`."""

    cache: str
    files: int
    copied: int
    skipped: int
    bytes: int


def copy(source: str | Path, target: str | Path, *, progress: Progress | None = None) -> CopyReport:
    """Copy a cache. A target that an earlier copy began is completed.

    Raises UsageError where the target holds something else or a process writes to the source, CacheError where the
    source is damaged, StoreError where a bucket cannot be reached.
    """
    cache, store = FeatureCache.open(source), location(target)
    if str(store) == str(cache.store):
        raise UsageError(f"{source} cannot be copied onto itself; give another path")
    _refuse_source(cache)
    there = store.sizes() if isinstance(store, BucketStore) or store.path.exists() else {}
    _refuse_target(store, there)
    stamps = _stamps(cache.store)
    noted = _noted(store, there)
    done = {name for name, stamp in stamps.items() if noted.get(name) == stamp and there.get(name) == stamp[0]}
    todo = sorted(stamps.keys() - done - {METADATA})
    notes, chunks = _Notes(store, noted), _chunks_of_shards(cache)

    def copy_file(name: str) -> str:
        data = cache.store.read(name)
        if data is None:
            raise CacheError(
                f"{cache.path}/{name} disappeared during the copy. Make sure that no other process writes to this "
                "cache, then run the same command again"
            )
        if name in chunks:
            check_shard(data, chunks[name], f"{cache.path}/{name}")
        store.write_whole(name, [data])
        notes.add(name, stamps[name])
        return name

    total, copied = len(stamps), len(done)
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="copy") as pool:
        for _ in in_order(pool, copy_file, todo, 2 * FILES_AT_ONCE):
            copied += 1
            if progress:
                progress(copied, total, "")
    store.write_whole(METADATA, [cache.store.read(METADATA) or b""])
    notes.remove()
    if progress:
        progress(total, total, "")
    _check_copy(store, stamps)
    return CopyReport(str(target), total, total - len(done), len(done), sum(size for size, _ in stamps.values()))


def _refuse_source(cache: FeatureCache) -> None:
    """Raise where a source is being written to, or where what it says of its clips is damaged."""
    if isinstance(cache.store, LocalStore) and running_slots(cache.store.path):
        raise UsageError(f"another process is writing to {cache.path}; copy it when that has ended")
    problems = [*metadata_problems(cache.store).values(), *column_problems(cache).values()]
    problems += [problem for _, problem in cache.clip_status.all_problems()]
    if problems:
        raise CacheError(
            f"{cache.path} is damaged and was not copied: {problems[0]}. See: whisper-at-cli verify; mend it by "
            "`extract` with --repair"
        )


def _chunks_of_shards(cache: FeatureCache) -> dict[str, int]:
    """By name of every shard's file: how many chunks it has."""
    S, L = cache.clips_per_shard, cache.spec.layers
    return {
        cache.layout.file(name, shard): L * (S if name == "features" else 1)
        for name in SHARDED for shard in range(shard_count(len(cache), S))
    }  # fmt: skip


def _refuse_target(store: LocalStore | BucketStore, there: dict[str, int]) -> None:
    if METADATA in there:
        raise UsageError(f"{store} is there already; choose another path, or remove it first")
    if there and not any(name.startswith(f"{NOTED}/") for name in there):
        other = next(iter(there))
        raise UsageError(f"{store} holds other files ({other}, ...); choose another path")


def _stamps(store: LocalStore | BucketStore) -> dict[str, tuple[int, str]]:
    """Of every file of a cache that is to be copied: its size, and what changes when it is written again."""
    return {
        name: stamp
        for name, stamp in store.stamps().items()
        if not name.startswith(LEFT) and not name.endswith(".partial")
    }


def _noted(store: LocalStore | BucketStore, there: dict[str, int]) -> dict[str, tuple[int, str]]:
    """What notes of an earlier copy say: by file, size and stamp of the source then."""
    found: dict[str, tuple[int, str]] = {}
    for name in sorted(name for name in there if name.startswith(f"{NOTED}/") and not name.endswith(".partial")):
        try:
            found |= {
                file: (int(size), str(stamp)) for file, (size, stamp) in json.loads(store.read(name) or b"").items()
            }
        except (ValueError, TypeError, AttributeError):  # a note that cannot be read: its files are copied again
            continue
    return found


class _Notes:
    """Notes on what was copied, each of many files. Safe between threads."""

    def __init__(self, store: LocalStore | BucketStore, noted: dict[str, tuple[int, str]]):
        self.store = store
        self._guard, self._waiting = threading.Lock(), dict(noted)
        self._number = 0
        self._write()
        for name in store.names(NOTED):  # of an earlier run, which the first note has now
            if name != self._name(0):
                store.remove(name)

    @staticmethod
    def _name(number: int) -> str:
        return f"{NOTED}/{number:06}.json"

    def add(self, name: str, stamp: tuple[int, str]) -> None:
        with self._guard:
            self._waiting[name] = stamp
            if len(self._waiting) >= FILES_PER_NOTE:
                self._write()

    def _write(self) -> None:
        self.store.write_whole(self._name(self._number), [json.dumps(self._waiting).encode()])
        self._waiting = {}
        self._number += 1

    def remove(self) -> None:
        for name in self.store.names(NOTED):
            self.store.remove(name)
        if isinstance(self.store, LocalStore):
            (self.store.path / NOTED).rmdir()


def _check_copy(store: LocalStore | BucketStore, stamps: dict[str, tuple[int, str]]) -> None:
    """Raise CacheError where a copy has not all files in their sizes."""
    sizes = store.sizes()
    wrong = [name for name, (size, _) in stamps.items() if sizes.get(name) != size]
    if wrong:
        raise CacheError(f"{store}/{wrong[0]} is incomplete after the copy; run the same command again")
