"""What `info` says of a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import Status, shard_count


def summarise(path: str | Path) -> dict:
    """Settings, counts, sizes and failures of the cache at `path`, ready for JSON."""
    cache = FeatureCache.open(path)
    spec, status = cache.spec, cache.status
    failed = np.flatnonzero(status == Status.FAILED)
    sizes = cache.store.sizes()
    return {
        "cache": str(path),
        "complete": cache.complete,
        "clips": len(cache),
        "done": int(cache.done.sum()),
        "failed": len(failed),
        "pending": int((status == Status.PENDING).sum()),
        "backbone": spec.backbone,
        "weights_sha256": spec.weights_sha256,
        "layers": spec.layers,
        "frames": spec.frames,
        "dim": spec.dim,
        "dtype": spec.dtype,
        "precision": spec.precision,
        "clip_seconds": spec.clip_seconds,
        "dataset": spec.dataset,
        "classes": len(spec.class_names),
        "class_names": list(spec.class_names),
        "folds": sorted({int(fold) for fold in cache.fold if fold > 0}),
        "splits": sorted({str(split) for split in cache.split if split}),
        "shards": shard_count(len(cache), cache.clips_per_shard),
        "clips_per_shard": cache.clips_per_shard,
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "made": cache.attributes.get("made", {}),
        "failures": [
            {"id": str(cache.ids[row]), "path": str(cache.paths[row]), "error": str(cache.errors[row])}
            for row in failed
        ],
    }
