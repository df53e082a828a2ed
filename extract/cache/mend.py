"""Columns of a cache that can no longer be read are written again from what the dataset says."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache import schema
from whisper_at_cli.extract.cache.locks import lock_slot
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import CacheSpec, ClipTable
from whisper_at_cli.extract.cache.store import sync_tree
from whisper_at_cli.extract.cache.verify import COLUMNS
from whisper_at_cli.extract.errors import CacheError

KEYS = ("id", "path", "digest")  # columns that tell clips apart, best first


def mend_columns(path: Path, names: Sequence[str], spec: CacheSpec, clips: ClipTable) -> None:
    """Write these columns of the cache at `path` again, for the clips of its dataset; its classes are those of `spec`.

    Of `error` nothing is known any more: it becomes empty. A process that is killed leaves columns that are damaged
    still. Raises CacheError if another process is at work on the cache, or if it cannot be told which clip is which.
    """
    with contextlib.closing(lock_slot(path, (1, 1))):
        cache = FeatureCache.open(path)
        table = clips.take(_rows(cache, names, clips))
        if "labels" in names and cache.spec.class_names != spec.class_names:
            raise CacheError(
                f"the labels of {path} are damaged and the dataset's classes are others than the cache's: restore the "
                "dataset as it was, or extract to another path"
            )
        beside = path.with_name(f".{path.name}.columns")
        shutil.rmtree(beside, ignore_errors=True)
        S = cache.clips_per_shard
        schema.create_arrays(beside, cache.spec, table, clips_per_shard=S, provenance={}, layout=cache.layout)
        sync_tree(beside)
        for name in names:
            shutil.rmtree(path / name, ignore_errors=True)
            (beside / name).rename(path / name)
        shutil.rmtree(beside, ignore_errors=True)


def _rows(cache: FeatureCache, damaged: Sequence[str], clips: ClipTable) -> np.ndarray:
    """(N,) int64: which clip of the dataset each row of the cache is, by the best column that can still be read."""
    columns = {"id": clips.ids, "path": clips.paths, "digest": clips.digests}
    for name in (name for name in KEYS if name not in damaged):
        ours, theirs = getattr(cache, COLUMNS[name]), columns[name]
        if ours is None or len(set(ours.tolist())) < len(ours):
            continue
        row_of = {value: row for row, value in enumerate(theirs.tolist())}
        found = [row_of.get(value, -1) for value in ours.tolist()]
        if len(row_of) == len(theirs) and len(theirs) == len(ours) and min(found, default=0) >= 0:
            return np.array(found, dtype=np.int64)
    raise CacheError(
        f"{cache.path} has damaged columns ({', '.join(damaged)}), and the dataset no longer holds the same clips: "
        "restore the dataset as it was, or extract to another path"
    )
