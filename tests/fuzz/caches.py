"""Feature caches: metadata of the group and its arrays, shard files and their index, log of status and text columns."""

from __future__ import annotations

import random
from pathlib import Path

import google_crc32c
import mutate
import numpy as np
import zarr  # noqa: F401 - else the first input would pay for it
from engine import Files, Reader
from numcodecs import zstd

from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, ShardBlock, Status
from whisper_at_cli.extract.cache.metadata import COPY
from whisper_at_cli.extract.cache.status_log import HEADER, MAGIC, MERGED
from whisper_at_cli.extract.cache.stream import stream_batches
from whisper_at_cli.extract.cache.summary import summarise
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.errors import CacheError

CRC = 4


def seeds(folder: Path) -> list[Files]:
    return [
        _cache(folder / "a", "float16", clips=5, per_shard=2, pending=0, classes=2),
        _cache(folder / "b", "int8", clips=3, per_shard=2, pending=0, classes=1),
        _cache(folder / "c", "float32", clips=4, per_shard=1, pending=2, classes=0),
        _cache(folder / "d", "float16", clips=0, per_shard=2, pending=0, classes=1),
    ]


def _cache(path: Path, dtype: str, *, clips: int, per_shard: int, pending: int, classes: int) -> Files:
    """The files of a cache with one failed clip, of which the last shards are not written yet."""
    L, T, D = 2, 3, 2
    spec = CacheSpec("fuzzed", "0" * 64, L, D, 5.0, dtype, class_names=[f"c{n}" for n in range(classes)], frames=T)
    ids = np.array([f"clip{n}" for n in range(clips)], dtype=object)
    table = (
        ClipTable(
            ids,
            ids,
            np.arange(clips, dtype=np.int16),
            ids,
            np.arange(clips * classes, dtype=np.uint8).reshape(clips, -1) % 2,
        )
        if classes and clips
        else ClipTable(ids, ids, np.zeros(clips, np.int16), ids, np.zeros((clips, classes), np.uint8))
    )
    shard_mb = per_shard * spec.clip_bytes / 1e6
    rng = np.random.default_rng(0)
    with CacheWriter.create(path, spec, table, shard_mb=shard_mb) as writer:
        shards = writer.pending_shards()
        for shard in shards[: len(shards) - pending]:
            block = ShardBlock.empty(len(writer.rows(shard)), spec)
            block.features[:] = rng.integers(-9, 9, block.features.shape)
            block.mean[:] = 1
            if block.scale is not None:
                block.scale[:] = 0.5
            block.valid_frames[:] = T
            block.status[:] = Status.DONE
            if shard == 1:
                block.status[0], block.errors = Status.FAILED, {0: "planted failure"}
            writer.write(shard, block)
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*")) if file.is_file() and ".locks" not in file.parts
    }  # fmt: skip


def change(files: Files, rng: random.Random, other: Files) -> Files:  # noqa: PLR0911 - one kind of change a line
    if not files:
        return other
    name, act = _chosen(files, rng), rng.random()
    data = files[name]
    if act < 0.04:
        return {kept: content for kept, content in files.items() if kept != name}
    if act < 0.08:
        return files | {name: other[rng.choice(list(other))]}
    if act < 0.1:
        others = ("status/.locks/1-of-9", "status/log/1-of-9.a")
        return files | {rng.choice((f"{name}0", name.replace("/c.0", "/c.1"), *others)): data}
    if name.endswith("zarr.json"):
        return files | {name: mutate.change_json(data, rng)}
    if rng.random() < 0.2 or len(data) < 3 * CRC:
        return files | {name: mutate.change_bytes(data, rng, other.get(name, data))}
    if name == MERGED:
        return files | {name: _change_log(data, rng)}
    if name == COPY:
        return files | {name: _sealed(zstd.compress(mutate.change_json(zstd.decompress(data[:-CRC]), rng)))}
    if name.startswith(("features/", "mean/", "scale/")):
        return files | {name: _change_shard(data, rng)}
    return files | {name: _sealed(mutate.change_bytes(data[:-CRC], rng))}


def _chosen(files: Files, rng: random.Random) -> str:
    """A file's name; metadata half of the time."""
    metadata = [name for name in files if name.endswith("zarr.json")]
    return rng.choice(metadata if metadata and rng.random() < 0.5 else list(files))


def _sealed(data: bytes) -> bytes:
    """With the checksum that these bytes should have."""
    return data + google_crc32c.value(data).to_bytes(CRC, "little")


def _change_log(data: bytes, rng: random.Random) -> bytes:
    """One record changed, or what it says of its clips, and its checksum made right."""
    records = data.split(MAGIC)[1:]
    if not records:
        return data
    at = rng.randrange(len(records))
    head, packed = records[at][: HEADER.size], records[at][HEADER.size : -CRC]
    if rng.random() < 0.5:
        packed = zstd.compress(mutate.change_bytes(zstd.decompress(packed), rng))
        head = head[:-4] + len(packed).to_bytes(4, "little")
    else:
        head = mutate.change_bytes(head, rng)
    records[at] = _sealed(head + packed)
    return b"".join(MAGIC + record for record in records)


def _change_shard(data: bytes, rng: random.Random) -> bytes:
    """Chunk or index changed, and its checksum made right: what a checksum cannot tell."""
    entries = rng.choice((1, 2, 4))  # of 16 bytes: how many chunks a shard of the seeds has
    at = max(0, len(data) - CRC - 16 * entries)
    if rng.random() < 0.7:
        index = mutate.change_bytes(data[at:-CRC], rng)
        return data[:at] + _sealed(index[: len(data) - CRC - at] if rng.random() < 0.8 else index)
    end = rng.choice((16, 14, 28, 8, 36))
    return _sealed(mutate.change_bytes(data[:end], rng)[:end]) + data[end + CRC :]


def read(folder: Path) -> str:
    """Everything that a reader may ask; what of it is refused does not keep the rest from being asked."""
    cache = FeatureCache.open(folder)
    refused: list[CacheError] = []
    done = np.flatnonzero(cache.done)[:4]
    asked = [
        lambda: summarise(folder), lambda: cache.ids, lambda: cache.labels, lambda: cache.fold, lambda: cache.errors,
        lambda: cache.split, lambda: cache.paths, lambda: cache.valid_frames, lambda: cache.features(done),
        lambda: cache.mean(rows=done), lambda: cache.layer(1, done), lambda: verify(folder),
        lambda: list(stream_batches(cache, 2)),
    ]  # fmt: skip
    for ask in asked:
        try:
            ask()
        except CacheError as error:
            refused.append(error)
    for error in refused:
        raise error
    return "cache"


READER = Reader("cache", seeds, change, read)
