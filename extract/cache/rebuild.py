"""A cache that takes the place of another, with other rows or columns: the old one or the new one, never half of each.

The new cache is laid out beside the old one. Shards that stay as they are become hard links, so that only what differs
is written; then the two folders change names in one step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache import schema
from whisper_at_cli.extract.cache.locks import lock_slot
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import CacheSpec, ClipTable, Status
from whisper_at_cli.extract.cache.store import LocalStore, sync_tree
from whisper_at_cli.extract.cache.writer import SHARDED, CacheWriter, ShardBlock

EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
AT_FDCWD = -100  # "relative to the working folder"


@dataclass(frozen=True)
class Plan:
    """What the new cache is to hold."""

    spec: CacheSpec
    clips: ClipTable  # M clips
    rows: np.ndarray  # (M,) int64: the rows of the old cache that hold them, -1 for what is to be extracted
    redo: np.ndarray  # (M,) bool: clips of the old cache that are to be extracted again


def update_path(path: Path) -> Path:
    """Where the new cache is laid out, and where the old one lies when the names are exchanged, until it is removed."""
    return path.with_name(f".{path.name}.update")


def rebuild(path: Path, plan: Plan, made: dict) -> None:
    """Put the planned cache in the place of the one at `path`. `made` is its record of how it was made.

    Raises CacheError if another process is at work on it.
    """
    beside = update_path(path)
    with contextlib.closing(lock_slot(path, (1, 1))):
        shutil.rmtree(beside, ignore_errors=True)
        old = FeatureCache.open(path)
        schema.create_arrays(beside, plan.spec, plan.clips, clips_per_shard=old.clips_per_shard, provenance=made)
        with CacheWriter.join(beside) as writer:
            for shard in range(schema.shard_count(len(plan.clips), old.clips_per_shard)):
                _fill_shard(old, writer, shard, plan)
            writer.finish(rewrite=True)
        with contextlib.closing(lock_slot(beside, (1, 1))):  # whoever comes while names change waits for neither
            sync_tree(beside)
            exchange(beside, path)
            shutil.rmtree(beside, ignore_errors=True)


def _fill_shard(old: FeatureCache, writer: CacheWriter, shard: int, plan: Plan) -> None:
    """Put into one shard of the new cache what the old one has of its clips."""
    assert isinstance(old.store, LocalStore) and isinstance(writer.store, LocalStore), "of folders alone"
    here = np.array(writer.rows(shard))
    rows = plan.rows[here]
    known = rows >= 0
    if not known.any() or (old.status[rows[known]] == Status.PENDING).all():
        return
    status = np.where(known & ~plan.redo[here], old.status[rows], Status.PENDING).astype(np.uint8)
    tried = np.flatnonzero(status != Status.PENDING).tolist()
    errors = {slot: text for slot in tried if (text := str(old.errors[rows[slot]]))}
    source = _same_shard(rows, old.clips_per_shard, len(old))
    if source is not None:
        for name in SHARDED:
            _link(old.store.path, old.layout.file(name, source), writer.store.path, writer.layout.file(name, shard))
        writer.mark(shard, np.where(known, old.valid_frames[rows], 0).astype(np.uint8), status, errors)
        return
    block = ShardBlock.empty(len(here), plan.spec)
    block.status[:], block.errors = status, errors
    done = np.flatnonzero(status == Status.DONE)
    at = rows[done]
    block.features[done], block.mean[done] = old.stored_features(at), old.mean(rows=at)
    if block.scale is not None:
        block.scale[done] = old.scale(at)
    block.valid_frames[done] = old.valid_frames[at]
    writer.write(shard, block)


def _same_shard(rows: np.ndarray, clips_per_shard: int, clips: int) -> int | None:
    """The old shard whose files serve a new one: each clip is where it was, and new ones are where none was."""
    known = np.flatnonzero(rows >= 0)
    shards, slots = np.divmod(rows[known], clips_per_shard)
    if (shards != shards[0]).any() or (slots != known).any():
        return None
    held = len(schema.shard_rows(int(shards[0]), clips_per_shard, clips))
    return int(shards[0]) if held == len(known) else None


def _link(old: Path, old_name: str, new: Path, new_name: str) -> None:
    """The same file in another cache, without its bytes being copied where the file system allows it."""
    source, target = old / old_name, new / new_name
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def exchange(first: Path, second: Path) -> None:
    """Two folders change names, in one step where the system has one."""
    with contextlib.suppress(AttributeError, OSError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), EXCHANGE) == 0:
            return
    before = _before(second)
    second.rename(before)
    first.rename(second)
    before.rename(first)


def recover(path: Path) -> None:
    """Give a cache its name back if a process was killed while two caches changed theirs, one step after the other."""
    if not path.exists() and _before(path).exists():
        with contextlib.suppress(OSError):  # another process was first
            _before(path).rename(path)


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")
