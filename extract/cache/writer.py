"""Writing a cache: one process's hold on it, whole shards at a time.

A shard is written in this order: features (and scale), mean, then what is known of its clips (`status`). Each file
appears whole or not at all, so a process killed anywhere leaves shards that are either done or still pending.
"""

from __future__ import annotations

import contextlib
import glob
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache import schema, shards
from whisper_at_cli.extract.cache.layout import SHARDED
from whisper_at_cli.extract.cache.locks import at_door, lock_slot
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import CacheSpec, ClipTable, Status
from whisper_at_cli.extract.cache.status import ShardStatus
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore, location, sync_tree
from whisper_at_cli.extract.errors import CacheError, UsageError, WhisperATError

PARTIAL_FILE = re.compile(r"/\.c\.(\d+)\..*\.partial$")
LEFT_SECONDS = 24 * 3600  # laying out a cache takes seconds


@dataclass
class ShardBlock:
    """All that one shard holds, for its n clips in row order. Rows of failed clips hold nothing that is stored.

    Whoever fills it has made sure that all values of clips that are done are finite.
    """

    features: np.ndarray  # (n, L, T, D) in storage type
    mean: np.ndarray  # (n, L, D) in the mean's type
    valid_frames: np.ndarray  # (n,) uint8
    status: np.ndarray  # (n,) uint8, DONE or FAILED
    errors: dict[int, str] = field(default_factory=dict)  # row within the shard -> why it failed, or a note
    scale: np.ndarray | None = None  # (n, L, D) float16, with int8 features
    image: shards.ShardImage | None = None  # whose chunks are the features, where their memory is laid out as the file

    @classmethod
    def empty(cls, clips: int, spec: CacheSpec) -> ShardBlock:
        """Room for `clips` clips, all failed until they are filled in."""
        L, T, D = spec.layers, spec.frames, spec.dim
        return cls(
            features=np.zeros((clips, L, T, D), dtype=spec.dtype),
            mean=np.zeros((clips, L, D), dtype=spec.mean_dtype),
            valid_frames=np.zeros(clips, dtype=np.uint8),
            status=np.full(clips, Status.FAILED, dtype=np.uint8),
            scale=np.zeros((clips, L, D), dtype=np.float16) if spec.dtype == "int8" else None,
        )

    def first(self, clips: int) -> ShardBlock:
        """The first rows of it alone, sharing memory, with no errors of their own yet."""
        scale = None if self.scale is None else self.scale[:clips]
        return ShardBlock(
            self.features[:clips], self.mean[:clips], self.valid_frames[:clips], self.status[:clips], scale=scale,
            image=self.image,
        )  # fmt: skip

    def clear(self) -> None:
        """Make every clip a failed one, as in a new block. What its features hold no longer counts."""
        self.valid_frames[:] = 0
        self.status[:] = Status.FAILED
        self.errors = {}


class CacheWriter:
    """Creates or continues a cache and writes whole shards into it.

    One process per slot: `slot=(i, n)` holds every n-th shard, and a lock keeps out whoever else would write them.
    In a bucket there is no lock: two processes with one slot do the same work twice and write the same bytes, unless
    they were asked for different things. Several threads may `write` different shards at once. Use as a context
    manager; the lock goes with the process.
    """

    def __init__(self, store: LocalStore | BucketStore, slot: tuple[int, int], *, lock: bool = True):
        self.store, self.path, self.slot = store, store.address, slot
        self._lock = lock_slot(store.path, slot) if lock and isinstance(store, LocalStore) else None
        self._merges, self.rewrites_status = lock, False
        try:
            self.cache = FeatureCache.open(self.path)
            self.cache.clip_status.slot = slot
            if lock:
                self._remove_partial_files()
        except BaseException:
            self.close()
            raise
        self.spec, self.clips_per_shard, self.layout = self.cache.spec, self.cache.clips_per_shard, self.cache.layout

    @classmethod
    def create(
        cls, path: str | Path, spec: CacheSpec, clips: ClipTable, *, shard_mb: float = schema.DEFAULT_SHARD_MB,
        slot: tuple[int, int] = (1, 1), provenance: dict | None = None, clips_per_shard: int | None = None,
    ) -> CacheWriter:  # fmt: skip
        """Start a new cache at `path`, or continue the one that is there if it was made with the same settings.

        `path` is a folder or a bucket's address. How many clips a shard has follows from `shard_mb`, unless it is
        given. Raises UsageError where it holds something else, CacheError where
        settings or clips differ or another process is at work on it.
        """
        store = location(path)
        _check_slot(slot)

        per_shard = clips_per_shard or spec.clips_per_shard(shard_mb, len(clips))

        def create_arrays(folder: Path) -> None:
            schema.create_arrays(folder, spec, clips, clips_per_shard=per_shard, provenance=provenance or {})

        new = False
        if isinstance(store, BucketStore):
            if store.read(schema.METADATA) is None:
                _create_in_bucket(store, create_arrays)
        elif not store.path.exists():
            new = _create_in_folder(store.path, create_arrays)
        schema.read_attributes(store)  # before the lock, so that a folder that is no cache is left as it is
        writer = cls(store, slot)
        try:
            if not new:
                writer._refuse_differences(spec, clips)
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def join(cls, path: str | Path, slot: tuple[int, int] = (1, 1)) -> CacheWriter:
        """Write shards of a cache for a process that holds the lock of `slot` and hands each shard to one writer.

        A writer that counts as lost may still be at a shard that another was given: they write files of their own.
        """
        store = location(path)
        if isinstance(store, LocalStore):
            store = LocalStore(store.path, mark=secrets.token_hex(4))
        return cls(store, slot, lock=False)

    def _refuse_differences(self, spec: CacheSpec, clips: ClipTable) -> None:
        refuse_settings(self.cache, spec)
        if not np.array_equal(self.cache.ids, clips.ids):
            shared = min(len(self.cache), len(clips))
            row = next((i for i in range(shared) if self.cache.ids[i] != clips.ids[i]), shared)
            raise CacheError(
                f"{self.path} holds {len(self.cache)} clips and the dataset names {len(clips)}; they differ from clip "
                f"{row + 1} on. Choose another path, or restore the dataset as it was"
            )

    def mine(self) -> np.ndarray:
        """(N,) bool: the clips of this slot."""
        index, of = self.slot
        return np.arange(len(self.cache)) // self.clips_per_shard % of == index - 1

    def shards_of(self, rows: np.ndarray) -> list[int]:
        """Shards of this slot that hold any of these rows, (N,) bool, in order."""
        return np.unique(np.flatnonzero(rows & self.mine()) // self.clips_per_shard).tolist()

    def pending_shards(self) -> list[int]:
        """Shards of this slot that hold a pending clip, in order."""
        return self.shards_of(self.cache.status == Status.PENDING)

    def block(self, shard: int, redo: np.ndarray) -> ShardBlock:
        """What is to be written into a shard, with room for the clips in `redo`, (N,) bool; the others as they are."""
        block = ShardBlock.empty(len(self.rows(shard)), self.spec)
        self.keep(shard, redo, block)
        return block

    def keep(self, shard: int, redo: np.ndarray, block: ShardBlock) -> None:
        """Put into an empty block what the cache has of a shard's clips that are not in `redo`, (N,) bool."""
        rows = np.array(self.rows(shard))
        done = self.cache.status[rows] == Status.DONE
        kept, others = np.flatnonzero(~redo[rows] & done), np.flatnonzero(~redo[rows])
        if len(kept):
            at = rows[kept]
            block.features[kept] = self.cache.stored_features(at)
            block.mean[kept] = self.cache.mean(rows=at)
            if block.scale is not None:
                block.scale[kept] = self.cache.scale(at)
            block.valid_frames[kept] = self.cache.valid_frames[at]
            block.status[kept] = Status.DONE
        if len(others):
            errors = self.cache.clip_status.errors(self.rows(shard))
            block.errors = {slot: str(errors[slot]) for slot in others.tolist() if errors[slot]}

    def update_paths(self, rows: np.ndarray, paths: list[str]) -> None:
        """Say where the files of these clips are, which were missing when the cache was made."""
        import zarr

        with self.store.asking("path"):
            array = zarr.open_array(self.store.zarr(), path="path", mode="r+", zarr_format=3)
            for first in range(0, array.shape[0], array.chunks[0]):
                here = (rows >= first) & (rows < first + array.chunks[0])
                if here.any():
                    column = np.asarray(array[first : first + array.chunks[0]], dtype=object)
                    column[rows[here] - first] = [path for path, inside in zip(paths, here, strict=True) if inside]
                    array[first : first + array.chunks[0]] = column
                    self.store.sync(self.layout.file("path", first // array.chunks[0]))

    def update_digests(self, digests: np.ndarray) -> None:
        """Say what is known now of the files of clips that are still to be extracted, (N,) uint64 for all clips."""
        import zarr

        with self.store.asking("digest"):
            zarr.open_array(self.store.zarr(), path="digest", mode="r+", zarr_format=3)[:] = digests

    def rows(self, shard: int) -> range:
        return schema.shard_rows(shard, self.clips_per_shard, len(self.cache))

    def write(self, shard: int, block: ShardBlock) -> None:
        """Put one shard safely on disk, then mark its clips. Raises CacheError where the disk refuses."""
        rows, done = self.rows(shard), block.status == Status.DONE
        if len(rows) != len(block.status):
            raise ValueError(f"shard {shard} has {len(rows)} clips, the block {len(block.status)}")
        try:
            files = {self.layout.file("features", shard): self._features_file(block, done)}
            for name, values in (("mean", block.mean), ("scale", block.scale)):
                if values is not None:
                    files[self.layout.file(name, shard)] = self._per_layer_file(name, values, done)
            self.store.write_together(files)
            self.mark(shard, block.valid_frames, block.status, block.errors)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> CacheError:
        return CacheError(
            f"cannot write to {self.path}: {error.strerror or error}. What was finished is kept; make room or mend "
            "the disk and run the same command again"
        )

    def mark(self, shard: int, valid_frames: np.ndarray, status: np.ndarray, errors: dict[int, str]) -> None:
        """Say of a shard whose features are in place what is known of its clips."""
        self.cache.clip_status.write(shard, ShardStatus(status, valid_frames, errors))

    def _features_file(self, block: ShardBlock, done: np.ndarray) -> list:
        L, T, D, S = self.spec.layers, self.spec.frames, self.spec.dim, self.clips_per_shard
        if block.image is not None and done.all():
            return [block.image.finished(len(done) * L)]
        chunks = np.ascontiguousarray(block.features).reshape(-1, T, D)
        present = np.zeros(S * L, dtype=bool)
        present[: len(chunks)] = np.repeat(done, L)
        return shards.shard_buffers(chunks, present)

    def _per_layer_file(self, name: str, values: np.ndarray, done: np.ndarray) -> list:
        full = values
        if len(values) < self.clips_per_shard or not done.all():
            full = np.full((self.clips_per_shard, *values.shape[1:]), np.nan, dtype=values.dtype)
            full[: len(values)][done] = values[done]
        chunks = np.ascontiguousarray(full.transpose(1, 0, 2))  # one chunk per layer
        return shards.shard_buffers(chunks, np.full(len(chunks), done.any()), compressed=name == "scale")

    def finish(self, *, rewrite: bool = False) -> None:
        """Say that this process writes no more; what is made of what is known of the clips is made.

        With `rewrite`, also where nothing was written. Raises CacheError where the disk refuses.
        """
        try:
            with self._door():
                self.cache.clip_status.finish(rewrite=rewrite)
        except OSError as error:
            raise self._refused(error) from error

    def _remove_partial_files(self) -> None:
        """Remove what processes that were killed left of files of this slot's shards, which lie among many."""
        index, of = self.slot
        if isinstance(self.store, LocalStore) and self.cache.layout.version > 1:
            for file in (file for name in SHARDED for file in self.store.names(name)):
                left = PARTIAL_FILE.search(file)
                if left and int(left[1]) % of == index - 1:
                    self.store.remove(file)

    def _door(self) -> contextlib.AbstractContextManager:
        if self._lock and isinstance(self.store, LocalStore):
            return at_door(self.store.path)
        return contextlib.nullcontext()

    def close(self) -> None:
        if self._lock:
            self._lock.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if self._merges:
                self.finish(rewrite=self.rewrites_status)
        except WhisperATError:
            if kind is None:
                raise
        finally:
            self.close()


def refuse_settings(cache: FeatureCache, spec: CacheSpec, *, classes: bool = True) -> None:
    """Raise CacheError where a cache was made with other settings, among them its classes unless `classes` is false."""
    asked = spec if classes else replace(spec, class_names=cache.spec.class_names)
    if differences := cache.spec.differences(asked):
        raise CacheError(
            f"{cache.path} was made with other settings ({'; '.join(differences)} as this run asks). "
            "Choose another path or the settings it was made with"
        )


def _check_slot(slot: tuple[int, int]) -> None:
    index, of = slot
    if not 1 <= index <= of:
        raise UsageError(f"--shard {index}/{of} is out of range; I runs from 1 to N")


def _create_in_folder(path: Path, create_arrays: Callable[[Path], None]) -> bool:
    """Lay out an empty cache, which appears whole; false where another process of the same job was first.

    What a process left that was killed over a day ago is removed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            if left.stat().st_mtime < time.time() - LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise UsageError(f"cannot make {path}: {error.strerror or error}; choose another path") from error
    try:
        create_arrays(temporary / "cache")
        sync_tree(temporary)
        (temporary / "cache").rename(path)
    except OSError as error:
        if (path / schema.METADATA).exists():
            return False
        raise CacheError(f"cannot make {path}: {error.strerror or error}; make room or choose another path") from error
    else:
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _create_in_bucket(store: BucketStore, create_arrays: Callable[[Path], None]) -> None:
    """Lay out an empty cache here and copy it there, the group's metadata last: without them it is no cache.

    What is there already is refused, unless it is a part of just this, left by a process that was stopped.
    """
    with tempfile.TemporaryDirectory(prefix="whisper-at-cli-") as folder:
        here = LocalStore(Path(folder) / "cache")
        create_arrays(here.path)
        names = sorted(here.sizes().keys() - {schema.METADATA})
        others = sorted(store.sizes().keys() - {*names, schema.METADATA})
        if others and store.read(schema.METADATA) is None:  # else another process of the same job was first
            raise UsageError(
                f"{store} holds {len(others)} objects that are no cache ({others[0]}, ...); choose another address or "
                "remove them"
            )
        if not others:
            store.map(lambda name: store.write_whole(name, [here.read(name)]), names)
            store.write_first(schema.METADATA, (here.path / schema.METADATA).read_bytes())
