"""The shards of one process: decode -> batch -> encode -> write, overlapped.

Other processes decode ahead of the encoder, as far as a bounded number of batches; a few threads write finished shards
behind it. Which clips share a batch depends on their place in the dataset alone, so that a resumed run encodes the same
batches as an uninterrupted one and stores the same bytes; batches whose audio is ready go first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from whisper_at_cli.extract.backbones.load import Backbone
from whisper_at_cli.extract.cache.schema import FRAMES, Status
from whisper_at_cli.extract.cache.storage import Stored
from whisper_at_cli.extract.cache.writer import CacheWriter
from whisper_at_cli.extract.devices import one_thread_per_operation, streams_of
from whisper_at_cli.extract.machine import cores
from whisper_at_cli.extract.pipeline.audio_batches import AudioBatches, Batch, DecodedBatch, Feed, Sources, batches_for
from whisper_at_cli.extract.pipeline.blocks import Block, Blocks
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.decode_worker import DONE
from whisper_at_cli.extract.pipeline.encode import encode_to_host
from whisper_at_cli.extract.progress import Progress

BATCHES_AHEAD = 3  # decoded or being decoded, beyond one for each stream
FEWEST_WRITERS, MOST_WRITERS = 2, 4  # threads that write shards; between them, one for every four cores


@dataclass(eq=False)
class _OpenShard:
    """A shard that is being filled."""

    batches_left: int
    whole: Block  # what was taken
    block: Block  # as many rows of it as the shard has


def real_frames(real: int, samples: int) -> int:
    """How many of a clip's frames hold any of its `real` samples; the others are padding."""
    return -(-real * FRAMES // samples)


def batch_slots(rows: range, redo: np.ndarray, batch_size: int) -> list[range]:
    """The batches of a shard of these rows that hold a clip in `redo`, (N,) bool; as places within the shard."""
    parts = [range(at, min(at + batch_size, len(rows))) for at in range(0, len(rows), batch_size)]
    return [slots for slots in parts if redo[rows[slots.start] : rows[slots.stop - 1] + 1].any()]


class ShardRun:
    """One extraction: audio decoded ahead of the encoder, and encoded shards written behind it.

    One thread (the caller's) hands out the work; encoding and writing have their own threads, decoding its processes.
    On a CPU, each core encodes its own batches with one thread, which wastes nothing on waiting for others. The
    caller's thread works by batches and shards, and does next to nothing for each clip.
    """

    def __init__(
        self, backbone: Backbone, writer: CacheWriter, redo: np.ndarray, *, samples: int, batch_size: int,
        progress: Progress | None = None, streams: int | None = None,
    ):  # fmt: skip
        self.backbone, self.writer, self.redo, self.progress = backbone, writer, redo, progress
        self.samples, self.batch_size = samples, min(batch_size, writer.clips_per_shard)
        self.streams = streams or streams_of(backbone.device)
        self.writers = max(FEWEST_WRITERS, min(MOST_WRITERS, cores() // 4))
        self.done = self.failed = self.redone = 0
        self.encode_seconds = self.disk_wait_seconds = self.seconds = 0.0
        self.total = int(writer.mine().sum())
        self.skipped = int((writer.mine() & ~redo).sum())
        self._open: dict[int, _OpenShard] = {}
        self._encoded: deque[tuple[DecodedBatch, Future]] = deque()  # filled by the encoder's threads
        self._written: deque[tuple[_OpenShard, Future]] = deque()  # and by the disk's
        self._encoding = self._decoding = self._writing = 0

    def from_pool(self, pool: DecodePool, clips: Sources) -> None:
        """Extract the clips in `redo` that this slot holds, decoded by a pool of processes."""
        count = self.streams + 1 + max(BATCHES_AHEAD, batches_for(pool.workers, self.batch_size))
        pinned = self.backbone.device.type == "cuda"
        feed = AudioBatches(
            pool, clips, samples=self.samples, batch_size=self.batch_size, count=count, pinned=pinned
        )  # fmt: skip
        try:
            self.all_shards(feed, count)
        finally:
            feed.close()

    def all_shards(self, feed: Feed, batches: int) -> None:
        """Extract the clips in `redo` that this slot holds, at most so many batches at work at a time."""
        started = time.perf_counter()
        self._report_progress()
        spanned = -(-batches * self.batch_size // self.writer.clips_per_shard)  # shards
        blocks = Blocks(
            spanned + self.writers, self.writer.clips_per_shard, self.writer.spec,
            pinned=self.backbone.device.type == "cuda",
        )  # fmt: skip
        encoders = ThreadPoolExecutor(self.streams, thread_name_prefix="encode", initializer=_prepare_thread)
        disk = ThreadPoolExecutor(self.writers, thread_name_prefix="write")
        try:
            with one_thread_per_operation(self.backbone.device.type == "cpu"):
                self._drive(feed, blocks, encoders, disk)
        finally:
            encoders.shutdown(wait=True, cancel_futures=True)
            disk.shutdown(wait=True)
        self.seconds = time.perf_counter() - started

    def _drive(self, feed: Feed, blocks: Blocks, encoders: ThreadPoolExecutor, disk: ThreadPoolExecutor) -> None:
        batches = self._batches()
        following = next(batches, None)
        while True:
            self._take_encoded(feed, disk)
            while self._written:
                shard, done = self._written.popleft()
                self._writing -= 1
                done.result()
                blocks.give(shard.whole)
            # Only now: whatever is not started or taken here waits for work that is still to end, which wakes us.
            while following and feed.free() and self._has_room(following, blocks):
                feed.start(following, self._rows(following))
                self._decoding += 1
                following = next(batches, None)
            while self._encoding <= self.streams and (decoded := feed.take()):
                self._decoding -= 1
                self._encoding += 1
                future = encoders.submit(self._encode, decoded)
                future.add_done_callback(partial(self._tell, feed, self._encoded, decoded))
            if not (following or self._decoding or self._encoding or self._writing):
                return
            self._wait(feed)

    def _take_encoded(self, feed: Feed, disk: ThreadPoolExecutor) -> None:
        """Note what was encoded, give its audio's memory back, and hand whole shards to the disk."""
        while self._encoded:
            decoded, future = self._encoded.popleft()
            self._encoding -= 1
            self._store(decoded, *future.result())
            feed.release(decoded.batch)
            number = decoded.batch.shard
            if not self._open[number].batches_left:
                shard = self._open.pop(number)
                self._writing += 1
                written = disk.submit(self.writer.write, number, shard.block.arrays)
                written.add_done_callback(partial(self._tell, feed, self._written, shard))

    def _wait(self, feed: Feed) -> None:
        """Wait until something has happened; if nothing is being decoded or encoded, that is the disk."""
        started = time.perf_counter()
        feed.wait()
        if not (self._decoding or self._encoding):
            self.disk_wait_seconds += time.perf_counter() - started

    @staticmethod
    def _tell(feed: Feed, done: deque, what: object, future: Future) -> None:
        """Called by the thread that did it."""
        done.append((what, future))
        feed.wake()

    @property
    def encoder_busy(self) -> float:
        """Share of the time in which the encoder's threads had work."""
        return self.encode_seconds / (self.streams * self.seconds) if self.encode_seconds else 0.0

    def _batches(self) -> Iterator[Batch]:
        """Every batch that holds a clip to be done, in order."""
        for shard in self.writer.shards_of(self.redo):
            for slots in batch_slots(self.writer.rows(shard), self.redo, self.batch_size):
                yield Batch(shard, slots)

    def _rows(self, batch: Batch) -> range:
        return self.writer.rows(batch.shard)[batch.slots.start : batch.slots.stop]

    def _has_room(self, batch: Batch, blocks: Blocks) -> bool:
        """Whether a batch's shard has a block, or gets one now."""
        if batch.shard in self._open:
            return True
        if not blocks.available():
            return False
        rows = self.writer.rows(batch.shard)
        whole = blocks.take()
        shard = _OpenShard(len(batch_slots(rows, self.redo, self.batch_size)), whole, whole.first(len(rows)))
        self.writer.keep(batch.shard, self.redo, shard.block.arrays)
        self._open[batch.shard] = shard
        return True

    def _encode(self, decoded: DecodedBatch) -> tuple[Stored | None, float]:
        """Encode a batch into its shard's block, and how long that took. Runs in an encoder thread.

        Clips that failed are encoded as silence, and dropped: another batch size could change a clip's last bit.
        Features of clips that the cache has already are left as they are.
        """
        if not any(kind == DONE for kind, _ in decoded.outcomes):
            return None, 0.0
        started = time.perf_counter()
        batch = decoded.batch
        block = self._open[batch.shard].block
        rows = self._rows(batch)
        redo = self.redo[rows.start : rows.stop]
        place = block.tensors.map(lambda tensor: tensor[batch.slots.start : batch.slots.stop])
        waveforms = torch.from_numpy(decoded.waveforms)
        stored = encode_to_host(
            self.backbone, waveforms, self.writer.spec.dtype, out=place if redo.all() else None
        )  # fmt: skip
        if not redo.all():
            wanted = torch.from_numpy(redo)
            for target, source in zip(place, stored, strict=True):
                if target is not None and source is not None:
                    target[wanted] = source[wanted]
        return stored, time.perf_counter() - started

    def _store(self, decoded: DecodedBatch, stored: Stored | None, seconds: float) -> None:
        """Note in a shard's block what came of a batch's clips."""
        batch = decoded.batch
        shard, slots = self._open[batch.shard], batch.slots
        rows, block = self._rows(batch), shard.block.arrays
        redo = self.redo[rows.start : rows.stop]
        finite = np.ones((len(slots), 1), dtype=bool) if stored is None else stored.finite.numpy()
        for at in np.flatnonzero(redo).tolist():
            slot, (kind, value) = slots[at], decoded.outcomes[at]
            if kind != DONE:
                block.errors[slot] = value
            elif not finite[at].all():
                block.errors[slot] = self._overflow_message(int(np.flatnonzero(~finite[at])[0]) + 1)
            else:
                block.valid_frames[slot] = real_frames(value.real, self.samples)
                block.status[slot] = Status.DONE
                if value.note:
                    block.errors[slot] = value.note
        done = int((block.status[slots.start : slots.stop][redo] == Status.DONE).sum())
        if stored is not None and stored.redone is not None:
            self.redone += int((stored.redone.numpy() & redo).sum())
        self.encode_seconds += seconds
        self.done += done
        self.failed += int(redo.sum()) - done
        self._report_progress()
        shard.batches_left -= 1

    def _overflow_message(self, layer: int) -> str:
        message = f"layer {layer} holds a value that is not finite in {self.writer.spec.dtype}"
        if self.writer.spec.dtype != "float32":
            return f"{message}; extract with --dtype float32"
        half = self.backbone.precision == "float16" and not hasattr(self.backbone, "in_float32")
        return f"{message}; extract with --precision float32" if half else message

    def _report_progress(self) -> None:
        if self.progress:
            note = f"{self.failed} failed" if self.failed else ""
            self.progress(self.skipped + self.done + self.failed, self.total, note)


def _prepare_thread() -> None:
    """OpenMP counts threads by the thread that asks: a new one does not know what was set elsewhere."""
    torch.set_num_threads(torch.get_num_threads())
