"""Shards of a new cache from what other caches hold: for `merge`, `select`, and a cache that follows its dataset.

What stays as it is, a whole shard of one cache, becomes a hard link where both lie in folders of one file system.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache import schema
from whisper_at_cli.extract.cache.layout import SHARDED
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import Status
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.cache.writer import CacheWriter, ShardBlock
from whisper_at_cli.extract.errors import CacheError

NOWHERE = -1  # in place of a row: no cache has the clip
CLIPS_AT_ONCE = 32  # of one shard, that are converted at a time


@dataclass(frozen=True)
class Origins:
    """Where each of the M clips of a new cache comes from."""

    caches: tuple[FeatureCache, ...]
    cache_of: np.ndarray  # (M,) int, which of the caches
    row_of: np.ndarray  # (M,) int64, its row there, NOWHERE for a clip that none has
    redo: np.ndarray | None = None  # (M,) bool: clips whose features are not to be taken

    @classmethod
    def one(cls, cache: FeatureCache, rows: np.ndarray, redo: np.ndarray | None = None) -> Origins:
        """All clips from one cache."""
        return cls((cache,), np.zeros(len(rows), dtype=np.int64), rows, redo)


def fill_shard(writer: CacheWriter, shard: int, origins: Origins) -> None:
    """Put into one shard of a new cache what there is of its clips; others stay pending.

    Raises CacheError where a source is damaged, or a value is too large for the storage type of the new cache.
    """
    here = np.array(writer.rows(shard))
    rows, cache_of = origins.row_of[here], origins.cache_of[here]
    known = rows != NOWHERE
    status = np.full(len(here), Status.PENDING, dtype=np.uint8)
    valid_frames = np.zeros(len(here), dtype=np.uint8)
    errors: dict[int, str] = {}
    for number in np.unique(cache_of[known]).tolist():
        cache, slots = origins.caches[number], np.flatnonzero(known & (cache_of == number))
        status[slots], valid_frames[slots] = cache.status[rows[slots]], cache.valid_frames[rows[slots]]
        errors |= {slot: text for slot in slots.tolist() if (text := str(cache.errors[rows[slot]]))}
    if origins.redo is not None:
        status[origins.redo[here]] = Status.PENDING
    if (status == Status.PENDING).all():
        return
    errors = {slot: text for slot, text in errors.items() if status[slot] != Status.PENDING}
    if _linked(writer, shard, origins, here):
        writer.mark(shard, valid_frames, status, errors)
        return
    block = ShardBlock.empty(len(here), writer.spec)
    block.status[:], block.errors = status, errors
    done = status == Status.DONE
    block.valid_frames[done] = valid_frames[done]
    for number in np.unique(cache_of[done]).tolist():
        slots = np.flatnonzero(done & (cache_of == number))
        for first in range(0, len(slots), CLIPS_AT_ONCE):
            some = slots[first : first + CLIPS_AT_ONCE]
            _take(origins.caches[number], rows[some], block, some, writer)
    writer.write(shard, block)


def _take(cache: FeatureCache, rows: np.ndarray, block: ShardBlock, slots: np.ndarray, writer: CacheWriter) -> None:
    """Copy clips of a cache into these slots of a block, as the new cache stores them."""
    layers = [cache.layer_numbers.index(number) for number in writer.cache.layer_numbers]
    block.mean[slots] = cache.mean(rows=rows)[:, layers]
    if cache.spec.dtype == writer.spec.dtype:
        block.features[slots] = _stored_layers(cache, rows, layers)
        if block.scale is not None:
            block.scale[slots] = cache.scale(rows)[:, layers]
        return
    import torch

    from whisper_at_cli.extract.cache.storage import to_storage

    values = cache.features(rows)[:, layers] if cache.spec.dtype == "int8" else _stored_layers(cache, rows, layers)
    stored = to_storage(torch.from_numpy(values.astype(np.float32)), writer.spec.dtype)
    if not bool(stored.finite.all()) or not np.isfinite(block.mean[slots]).all():
        row = rows[int(stored.finite.all(dim=1).logical_not().int().argmax())]
        raise CacheError(
            f"clip {cache.ids[row]!s} of {cache.path} has values that {writer.spec.dtype} cannot hold; choose another "
            "--dtype"
        )
    block.features[slots] = stored.features.numpy()
    if block.scale is not None and stored.scale is not None:
        block.scale[slots] = stored.scale.numpy()


def _stored_layers(cache: FeatureCache, rows: np.ndarray, layers: list[int]) -> np.ndarray:
    """(n, len(layers), T, D) as stored. Where a few layers are asked for, they alone are read, but for int8."""
    if len(layers) == cache.spec.layers or cache.spec.dtype == "int8":
        return cache.stored_features(rows)[:, layers]
    numbers = [cache.layer_numbers[layer] for layer in layers]
    return np.stack([cache.layer(number, rows, dtype=cache.spec.dtype) for number in numbers], axis=1)


def _linked(writer: CacheWriter, shard: int, origins: Origins, here: np.ndarray) -> bool:
    """Whether the files of a shard could be linked to those of a shard that holds the same."""
    rows, cache_of = origins.row_of[here], origins.cache_of[here]
    known = rows != NOWHERE
    cache = origins.caches[int(cache_of[known][0])]
    if (cache_of[known] != cache_of[known][0]).any() or cache.clips_per_shard != writer.clips_per_shard:
        return False
    same = cache.spec.dtype == writer.spec.dtype and cache.layer_numbers == writer.cache.layer_numbers
    if not same or not isinstance(cache.store, LocalStore) or not isinstance(writer.store, LocalStore):
        return False
    source = _same_shard(rows, cache.clips_per_shard, len(cache))
    if source is None:
        return False
    for name in SHARDED:
        file = writer.layout.file(name, shard)
        _link(cache.store.path / cache.layout.file(name, source), writer.store.path / file)
        writer.store.sync(file)
    return True


def _same_shard(rows: np.ndarray, clips_per_shard: int, clips: int) -> int | None:
    """The old shard whose files serve a new one: each clip is where it was, and new ones are where none was."""
    known = np.flatnonzero(rows != NOWHERE)
    shards, slots = np.divmod(rows[known], clips_per_shard)
    if (shards != shards[0]).any() or (slots != known).any():
        return None
    held = len(schema.shard_rows(int(shards[0]), clips_per_shard, clips))
    return int(shards[0]) if held == len(known) else None


def _link(source: Path, target: Path) -> None:
    """The same file in another cache, without its bytes being copied where the file system allows it."""
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(source, partial)
        partial.replace(target)
