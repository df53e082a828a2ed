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
from whisper_at_cli.extract.cache.gather import Origins, fill_shard
from whisper_at_cli.extract.cache.locks import lock_slot
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import CacheSpec, ClipTable
from whisper_at_cli.extract.cache.store import sync_tree
from whisper_at_cli.extract.cache.writer import CacheWriter

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
        origins = Origins.one(old, plan.rows, plan.redo)
        with CacheWriter.join(beside) as writer:
            for shard in range(schema.shard_count(len(plan.clips), old.clips_per_shard)):
                fill_shard(writer, shard, origins)
            writer.finish(rewrite=True)
        with contextlib.closing(lock_slot(beside, (1, 1))):  # whoever comes while names change waits for neither
            sync_tree(beside)
            exchange(beside, path)
            shutil.rmtree(beside, ignore_errors=True)


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
