"""What `info` says of a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache.locks import lock_files, running_slots
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import Status, shard_count
from whisper_at_cli.extract.cache.store import LocalStore

MOST_SLOTS = 10_000  # tasks that are all listed


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
        "folds": [fold for fold in np.unique(cache.fold).tolist() if fold > 0],
        "splits": sorted({str(split) for split in set(cache.split.tolist()) if split}),
        "shards": shard_count(len(cache), cache.clips_per_shard),
        "clips_per_shard": cache.clips_per_shard,
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "made": cache.attributes.get("made", {}),
        "slots": _slots(cache),
        "failures": [
            {"id": str(cache.ids[row]), "path": str(cache.paths[row]), "error": str(cache.errors[row])}
            for row in failed
        ],
        "notes": [
            {"id": str(cache.ids[row]), "path": str(cache.paths[row]), "note": str(cache.errors[row])}
            for row in np.flatnonzero(cache.done & (cache.errors != ""))
        ],
    }


def _slots(cache: FeatureCache) -> list[dict]:
    """What each task of the last division of the work (`--shard I/N`) has still to do, and whether it is running.

    Of more than MOST_SLOTS tasks, those that were started.
    Empty in a bucket, which has no locks and so no trace of the tasks.
    """
    if not isinstance(cache.store, LocalStore) or not (files := lock_files(cache.store.path)):
        return []
    running = running_slots(cache.store.path)
    of = max(files, key=lambda slot: files[slot].stat().st_mtime)[1]
    slot_of = np.arange(len(cache)) // cache.clips_per_shard % of
    return [
        {
            "shard": f"{index}/{of}",
            "clips": int((slot_of == index - 1).sum()),
            **{status.name.lower(): int((cache.status[slot_of == index - 1] == status).sum()) for status in Status},
            "running": (index, of) in running,
        }
        for index in (range(1, of + 1) if of <= MOST_SLOTS else sorted(index for index, n in files if n == of))
    ]
