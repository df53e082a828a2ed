"""A cache as training reads it: a torch dataset of clips, and one epoch of shuffled batches read shard by shard.

N clips in the cache, B in a batch, L layers, T frames, D channels, C classes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, Queue

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.cache.reader import FeatureCache, Rows
from whisper_at_cli.extract.errors import UsageError

BUFFER_MB = 1024  # eight shards of the usual size
READ_BYTES = 8 << 20  # of features read at once on their way into the buffer

PASSES = 8  # over the cache in one epoch, at most, where clips come several times

# rows (B,) int64, features (B, L, T, D), labels (B, C) float32; with `stored` int8 also its scale (B, L, D)
Batch = tuple[np.ndarray, Tensor, Tensor, *tuple[Tensor, ...]]


class FeatureDataset(torch.utils.data.Dataset):
    """Finished clips of a cache (or these rows of it): features (L, T, D) as stored, labels (C,) float32.

    Safe between threads. Pickles as the cache's path, so spawned workers open their own; do not fork workers while
    another thread reads. int8 is decoded to float32.
    """

    def __init__(self, cache: FeatureCache | str | Path, rows: Rows | None = None):
        self.cache = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
        self.rows = self.cache._real_rows(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Several clips by one read, which is how a DataLoader asks for a batch."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        features = torch.from_numpy(self.cache.features(rows))
        return list(zip(features, _labels(self.cache, rows), strict=True))


def stream_batches(
    cache: FeatureCache, batch_size: int, *, rows: Rows | None = None, seed: int | Sequence[int] = 0,
    buffer_mb: float = BUFFER_MB, pin: bool = False, prefetch: int = 2, reads: str = "features",
    repeats: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """One epoch over the finished clips (or these rows), each once, in an order that the seed alone decides.

    A thread reads shards in random order, each from its first to its last clip, into a buffer of about `buffer_mb`
    (at least one shard and one batch), from which batches are drawn at random; `prefetch` of them wait to be taken.
    Only the last may be smaller. Give each epoch a seed of its own: a number, or a sequence such as (seed, epoch).
    With `pin`, features and labels lie in pinned memory where there is CUDA. `reads` names what comes in place of
    decoded features: `stored`, features as they lie on disk and with int8 their scale (B, L, D) as a fourth part of
    each batch; `mean` (B, L, 1, D) or `last mean` (B, 1, 1, D), means over time. With `repeats`, rows may name a clip
    several times: its turns are dealt to up to eight passes over the shards, which follow on each other.

    The thread ends with the epoch, with an error (which is raised here), or when the iterator is closed or dropped.
    """
    if batch_size < 1 or prefetch < 1 or not buffer_mb > 0:
        raise UsageError(
            f"a batch of {batch_size} clips, {prefetch} batches ahead and a buffer of {buffer_mb} MB were asked for; "
            "each has to be more than 0"
        )
    rows = cache._real_rows(rows)
    if not repeats and len(np.unique(rows)) != len(rows):
        raise UsageError("rows name a clip twice; an epoch has each clip once")
    stop = threading.Event()
    return in_thread(_draw_epoch(cache, rows, batch_size, seed, buffer_mb, pin, stop, reads), prefetch, stop)


def _labels(cache: FeatureCache, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(cache.labels[rows].astype(np.float32))


class _ShuffleBuffer:
    """Room for `capacity` clips. `held` lists the slots that are taken, `free` those that are not."""

    def __init__(self, cache: FeatureCache, capacity: int, reads: str):
        self.cache, self.reads = cache, reads
        self.parts = [np.empty((capacity, *shape), dtype) for shape, dtype in _parts(cache, reads)]
        self.row = np.empty(capacity, dtype=np.int64)
        self.held: list[int] = []
        self.free = list(range(capacity))
        self.step = max(1, READ_BYTES // _clip_bytes(cache, reads))

    def add(self, rows: np.ndarray) -> None:
        """Read these rows, of one shard, into free slots."""
        slots = [self.free.pop() for _ in rows]
        if self.reads in ("mean", "last mean"):
            layer = None if self.reads == "mean" else self.cache.spec.layers
            means = self.cache.mean(layer, rows)
            self.parts[0][slots] = means.reshape(len(rows), -1, 1, means.shape[-1])
        else:
            read = self.cache.stored_features if self.reads == "stored" else self.cache.features
            for first in range(0, len(rows), self.step):
                self.parts[0][slots[first : first + self.step]] = read(rows[first : first + self.step])
        if len(self.parts) > 1:
            self.parts[1][slots] = self.cache.scale(rows)
        self.row[slots] = rows
        self.held += slots

    def draw(self, count: int, rng: np.random.Generator, pin: bool) -> Batch:
        """Take some clips out, at random."""
        for _ in range(count):  # the drawn ones move to the end
            at = int(rng.integers(len(self.held)))
            slot, self.held[at] = self.held[at], self.held[-1]
            self.held.pop()
            self.free.append(slot)
        slots = self.free[-count:]
        drawn = [_empty((count, *part.shape[1:]), part.dtype, pin) for part in self.parts]
        for part, out in zip(self.parts, drawn, strict=True):
            np.take(part, slots, axis=0, out=out.numpy(), mode="clip")  # mode "raise" would copy twice
        rows = self.row[slots]
        labels = _labels(self.cache, rows)
        return rows, drawn[0], labels.pin_memory() if pin else labels, *drawn[1:]


def _draw_epoch(
    cache: FeatureCache, rows: np.ndarray, batch_size: int, seed: int | Sequence[int], buffer_mb: float, pin: bool,
    stop: threading.Event, reads: str,
) -> Iterator[Batch]:  # fmt: skip
    rng = np.random.default_rng(seed)
    pin = pin and torch.cuda.is_available()
    shards = []
    for some in _passes(rows, rng):
        in_order = _by_shard(some, cache.clips_per_shard)
        rng.shuffle(in_order)
        shards += in_order
    least = max(map(len, shards), default=0) + batch_size  # so that a whole shard fits when no whole batch is left
    capacity = max(least, int(buffer_mb * 1e6 / _clip_bytes(cache, reads)))
    buffer = _ShuffleBuffer(cache, min(len(rows), capacity), reads)
    for shard in shards:
        while len(buffer.free) < len(shard):
            yield buffer.draw(batch_size, rng, pin)
        if stop.is_set():
            return
        buffer.add(shard)
    while buffer.held:
        yield buffer.draw(min(batch_size, len(buffer.held)), rng, pin)


def _passes(rows: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The rows themselves where each comes once; else dealt out, so that a row's turns lie in different passes."""
    each, count = np.unique(rows, return_counts=True)
    passes = min(PASSES, int(count.max(initial=1)))
    if passes == 1:
        return [rows]
    turn = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    dealt_to = (np.repeat(rng.integers(passes, size=len(each)), count) + turn) % passes
    in_order = np.repeat(each, count)
    return [in_order[dealt_to == number] for number in range(passes)]


def _by_shard(rows: np.ndarray, clips_per_shard: int) -> list[np.ndarray]:
    """Rows in ascending order, an array for each shard that holds any."""
    rows = np.sort(rows)
    edges = np.flatnonzero(np.diff(rows // clips_per_shard)) + 1
    return np.split(rows, edges) if len(rows) else []


def _parts(cache: FeatureCache, reads: str) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of what is held of a clip."""
    L, T, D = cache.spec.layers, cache.spec.frames, cache.spec.dim
    if reads in ("mean", "last mean"):
        return [((L if reads == "mean" else 1, 1, D), np.dtype(cache.spec.mean_dtype))]
    if cache.spec.dtype != "int8":
        return [((L, T, D), np.dtype(cache.spec.dtype))]
    if reads == "features":
        return [((L, T, D), np.dtype("float32"))]
    return [((L, T, D), np.dtype("int8")), ((L, D), np.dtype("float16"))]


def _empty(shape: tuple[int, ...], dtype: np.dtype, pin: bool) -> Tensor:
    if pin:
        return torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype))  # huge pages: 98 MB filled in 9 ms, 38 ms in torch.empty's


def _clip_bytes(cache: FeatureCache, reads: str) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in _parts(cache, reads))


def in_thread(batches: Iterator, ahead: int, stop: threading.Event) -> Iterator:
    """What `batches` yields in a thread of its own, at most `ahead` of it waiting here. The thread ends with it, with
    an error (which is raised here), or when the iterator is closed; `stop` is set then."""
    waiting: Queue[Batch | BaseException | None] = Queue(ahead)
    thread = threading.Thread(target=_feed, args=(batches, waiting, stop), name="stream batches", daemon=True)
    thread.start()
    try:
        while (batch := waiting.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        stop.set()
        while thread.is_alive():  # it may be waiting to put one more
            try:
                waiting.get(timeout=0.01)
            except Empty:
                continue
        thread.join()


def _feed(batches: Iterator[Batch], waiting: Queue, stop: threading.Event) -> None:
    try:
        for batch in batches:
            waiting.put(batch)
            if stop.is_set():
                return
    except BaseException as error:  # noqa: BLE001 - raised where the batches are taken
        waiting.put(error)
    else:
        waiting.put(None)
