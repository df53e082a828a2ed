"""Caches with known content, written without any audio or encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, ShardBlock, Status
from whisper_at_cli.extract.cache.layout import Layout
from whisper_at_cli.extract.cache.schema import create_arrays
from whisper_at_cli.extract.cache.store import location


def planted_cache(
    path: Path, features, labels, *, fold=None, split=None, class_names=None, dtype="float32", shard_mb=128.0,
    backbone="planted", clip_seconds=5.0, failed=(), weights_sha256="0" * 64, scale=None,
    version=2,
) -> FeatureCache:  # fmt: skip
    """A finished cache with these features (N, L, T, D) and labels ((N, C) of 0 and 1, or (N,) class numbers)."""
    features, labels = np.asarray(features), np.asarray(labels)
    if labels.ndim == 1:
        labels = np.eye(int(labels.max()) + 1, dtype=np.uint8)[labels]
    N, L, T, D = features.shape
    names = class_names or [f"class{c}" for c in range(labels.shape[1])]
    spec = CacheSpec(
        backbone=backbone, weights_sha256=weights_sha256, layers=L, dim=D, frames=T, clip_seconds=clip_seconds,
        dtype=dtype, class_names=tuple(names),
    )  # fmt: skip
    clips = ClipTable(
        ids=np.array([f"clip{i}" for i in range(N)]),
        paths=np.array([f"audio/clip{i}.wav" for i in range(N)]),
        fold=np.zeros(N, dtype=np.int16) if fold is None else np.asarray(fold, dtype=np.int16),
        split=np.full(N, "", dtype=object) if split is None else np.asarray(split, dtype=object),
        labels=labels.astype(np.uint8),
    )
    if version == 1:
        per_shard = spec.clips_per_shard(shard_mb, N)
        create_arrays(path, spec, clips, clips_per_shard=per_shard, provenance={}, layout=Layout(1))
    with CacheWriter.create(path, spec, clips, shard_mb=shard_mb) as writer:
        for shard in writer.pending_shards():
            rows = np.array(writer.rows(shard))
            block = ShardBlock.empty(len(rows), spec)
            block.features[:] = features[rows]
            block.mean[:] = features[rows].mean(axis=2)
            if scale is not None:
                block.scale[:] = scale[rows]
            block.valid_frames[:] = T
            block.status[:] = [Status.FAILED if row in failed else Status.DONE for row in rows]
            block.errors = {i: "planted failure" for i, row in enumerate(rows) if row in failed}
            writer.write(shard, block)
    return FeatureCache.open(path)


def forget(path: Path, *shards: int) -> None:
    """Make the clips of these shards pending, as if they had not been written."""
    with CacheWriter(location(path), (1, 1)) as writer:
        for shard in shards:
            nothing = np.zeros(len(writer.rows(shard)), np.uint8)
            writer.mark(shard, nothing, nothing, {})
