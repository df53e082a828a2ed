"""What an extraction would do, without doing it: clips, hours, the cache's size, and the time where it is known."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whisper_at_cli.extract.backbones.custom import clip_samples
from whisper_at_cli.extract.backbones.load import Backbone
from whisper_at_cli.extract.cache.changes import NEW, changes
from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import METADATA, CacheSpec, array_shapes, shard_count
from whisper_at_cli.extract.cache.store import location
from whisper_at_cli.extract.cache.writer import refuse_settings
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.datasets.digests import source_digests
from whisper_at_cli.extract.devices import fitting_batch_size
from whisper_at_cli.extract.machine import cores
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.encode import encode_to_host
from whisper_at_cli.extract.pipeline.options import ExtractOptions
from whisper_at_cli.extract.pipeline.prepare import open_backbone, open_clips, seconds_of, spec_of

TIMED_BATCHES, TIMED_CLIPS, TIMED_SECONDS = 3, 64, 20.0  # at most, of which the encoder's rate is taken


@dataclass(frozen=True)
class ExtractPlan:
    """What `extract` would do. `bytes` are those of the cache's arrays as its schema gives them, `text` left out.

    `seconds` is what encoding alone takes at `clips_per_second`, which was timed on noise; None where nothing was
    timed, because nothing is to be done or a batch takes too long. Decoding and writing may take longer.
    """

    cache: str
    exists: bool
    dataset: str
    clips: int
    done: int  # of them, in a cache that exists, and the same still
    changed: str  # what differs between that cache and the dataset, in words
    hours: float  # of audio that is encoded, padding included
    clip_seconds: float
    classes: int
    backbone: str
    layers: int
    dim: int
    dtype: str
    clips_per_shard: int
    shards: int
    bytes: int
    batch_size: int
    device: str
    clips_per_second: float | None
    seconds: float | None
    notes: tuple[str, ...]


def plan_extraction(
    dataset: str | Path | Dataset, cache: str | Path, options: ExtractOptions | None = None, **given: Any
) -> ExtractPlan:
    """What `extract` with these options would do. Makes no cache, and reads no more of the audio than some headers."""
    options = ExtractOptions.of(options, given)
    dtype = options.dtype
    with DecodePool(options.workers or cores()) as pool:
        clips = open_clips(dataset, pool, options)
    seconds = seconds_of(clips, options)
    backbone = open_backbone(cache, options)
    samples = clip_samples(backbone, seconds)
    size = options.batch_size or fitting_batch_size(backbone, samples, dtype)
    spec = spec_of(clips, backbone, options)
    exists = location(cache).exists(METADATA)
    done, changed = _in_cache(cache, clips, spec) if exists else (0, "")
    todo, per_shard = max(0, len(clips) - done), spec.clips_per_shard(options.shard_mb, len(clips))
    rate = _rate(backbone, samples, size, dtype) if todo else None
    return ExtractPlan(
        cache=str(cache), exists=exists, dataset=clips.name, clips=len(clips), done=done, changed=changed,
        hours=round(len(clips) * seconds / 3600, 3), clip_seconds=seconds, classes=len(spec.class_names),
        backbone=backbone.name, layers=spec.layers, dim=spec.dim, dtype=dtype, clips_per_shard=per_shard,
        shards=shard_count(len(clips), per_shard), bytes=array_bytes(array_shapes(spec, len(clips))), batch_size=size,
        device=str(backbone.device), clips_per_second=None if rate is None else round(rate, 2),
        seconds=None if rate is None else round(todo / rate, 1), notes=tuple(clips.notes),
    )  # fmt: skip


def _in_cache(cache: str | Path, clips: Dataset, spec: CacheSpec) -> tuple[int, str]:
    """How many clips a cache has already, and what differs between it and the dataset. May raise CacheError."""
    old = FeatureCache.open(cache)
    refuse_settings(old, spec, classes=False)
    found = changes(old, spec, replace(clips.table(sparse=True), digests=source_digests(clips)))
    kept = found.rows != NEW
    return int((old.done[found.rows[kept]] & ~found.audio[kept]).sum()), found.described()


def array_bytes(shapes: dict[str, tuple[tuple[int, ...], str]]) -> int:
    """Bytes of all arrays of these shapes and types, but those of text."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values() if dtype)


def _rate(backbone: Backbone, samples: int, batch_size: int, dtype: str) -> float | None:
    """Clips a second of the encoder by itself, from a few batches of noise; None where one takes too long."""
    clips = min(batch_size, TIMED_CLIPS)
    noise = torch.from_numpy(np.random.default_rng(0).integers(-9999, 9999, (clips, samples), dtype=np.int16))
    started = time.perf_counter()
    encode_to_host(backbone, noise[:1], dtype)  # what is done once only
    if (time.perf_counter() - started) * clips > TIMED_SECONDS:
        return None
    best, begun = math.inf, time.perf_counter()
    for _ in range(TIMED_BATCHES):
        started = time.perf_counter()
        encode_to_host(backbone, noise, dtype)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - begun > TIMED_SECONDS:
            break
    return clips / best
