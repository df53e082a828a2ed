"""The shards of one process: decode -> batch -> encode -> write, overlapped.

Threads decode ahead of the encoder, as far as a bounded window of batches; one thread writes finished shards behind it.
Which clips share a batch depends on their place in the dataset alone, so that a resumed run encodes the same batches as
an uninterrupted one and stores the same bytes; batches whose audio is ready go first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from whisper_at_cli.extract.backbones.load import Backbone
from whisper_at_cli.extract.cache.schema import FRAMES, Status
from whisper_at_cli.extract.cache.storage import Stored
from whisper_at_cli.extract.cache.writer import CacheWriter, ShardBlock
from whisper_at_cli.extract.devices import one_thread_per_operation, streams_of
from whisper_at_cli.extract.errors import AudioError
from whisper_at_cli.extract.pipeline.encode import encode_to_host
from whisper_at_cli.extract.progress import Progress

BATCHES_AHEAD = 3  # decoded or being decoded, beyond one for each stream
SHARDS_BEHIND = 2  # encoded and not yet on disk


@dataclass
class _Batch:
    """Clips that are encoded together: rows within one shard, and their audio as it is decoded."""

    shard: int
    slots: range  # within the shard
    audio: list[Future]

    def ready(self) -> bool:
        return all(future.done() for future in self.audio)


@dataclass
class _Encoded:
    """What came of a batch: which of its clips were encoded, and why the others were not."""

    slots: list[int] = field(default_factory=list)
    valid_frames: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    stored: Stored | None = None  # on the host
    seconds: float = 0.0  # that encoding took


@dataclass
class _OpenShard:
    """A shard that is being filled; it takes memory from its first encoded batch on."""

    batches_left: int
    block: ShardBlock | None = None


def real_frames(real: int, samples: int) -> int:
    """How many of a clip's frames hold any of its `real` samples; the others are padding."""
    return -(-real * FRAMES // samples)


def batch_slots(rows: range, redo: np.ndarray, batch_size: int) -> list[range]:
    """The batches of a shard of these rows that hold a clip in `redo`, (N,) bool; as places within the shard."""
    parts = [range(at, min(at + batch_size, len(rows))) for at in range(0, len(rows), batch_size)]
    return [slots for slots in parts if redo[rows[slots.start] : rows[slots.stop - 1] + 1].any()]


class Waveforms(Protocol):
    """Where the audio of the cache's rows comes from: the dataset, or what was sent of it."""

    def waveform(self, row: int, samples: int) -> tuple[np.ndarray, int]:
        """(samples,) float32, and how many of them are real. Raises AudioError."""
        ...


class ShardRun:
    """One extraction: audio decoded ahead of the encoder, and encoded shards written behind it.

    One thread (the caller's) hands out the work and fills the shards; decoding, encoding and writing have threads of
    their own. On a CPU, each core encodes its own batches with one thread, which wastes nothing on waiting for others.
    """

    def __init__(
        self, dataset: Waveforms, backbone: Backbone, writer: CacheWriter, redo: np.ndarray, samples: int,
        batch_size: int, workers: int, progress: Progress | None, streams: int | None = None,
    ):  # fmt: skip
        self.dataset, self.backbone, self.writer = dataset, backbone, writer
        self.samples, self.batch_size, self.progress = samples, batch_size, progress
        self.streams = streams or streams_of(backbone.device)
        self.decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.encoders = ThreadPoolExecutor(self.streams, thread_name_prefix="encode", initializer=_prepare_thread)
        self.disk = ThreadPoolExecutor(1, thread_name_prefix="write")
        self.open_shards: dict[int, _OpenShard] = {}
        self.writing: deque[Future] = deque()
        self.done = self.failed = self.redone = 0
        self.encode_seconds = self.disk_wait_seconds = self.seconds = 0.0
        self.redo = redo
        self.total = int(writer.mine().sum())
        self.skipped = int((writer.mine() & ~redo).sum())

    def all_shards(self) -> None:
        """Extract the clips in `redo` that this slot holds."""
        started = time.perf_counter()
        self._report_progress()
        waiting = self._batches()
        decoding: deque[_Batch] = deque()
        encoding: dict[Future[_Encoded], _Batch] = {}
        try:
            with one_thread_per_operation(self.backbone.device.type == "cpu"):
                while True:
                    while len(decoding) < self.streams + BATCHES_AHEAD and (batch := next(waiting, None)):
                        decoding.append(batch)
                    if decoding and len(encoding) <= self.streams:
                        batch = _take_ready(decoding)
                        encoding[self.encoders.submit(self._encode, batch)] = batch
                    elif encoding:
                        for future in wait(encoding, return_when=FIRST_COMPLETED).done:
                            self._store(encoding.pop(future), future.result())
                    else:
                        break
            self._wait_for_disk(0)
        finally:
            for pool in (self.decoders, self.encoders, self.disk):
                pool.shutdown(wait=True, cancel_futures=pool is not self.disk)
        self.seconds = time.perf_counter() - started

    @property
    def encoder_busy(self) -> float:
        """Share of the time in which the encoder's threads had work."""
        return self.encode_seconds / (self.streams * self.seconds) if self.encode_seconds else 0.0

    def _wait_for_disk(self, behind: int) -> None:
        """Wait until at most so many shards are still to be written."""
        started = time.perf_counter()
        while len(self.writing) > behind:
            self.writing.popleft().result()
        self.disk_wait_seconds += time.perf_counter() - started

    def _batches(self) -> Iterator[_Batch]:
        """Every batch that holds a clip to be done, its decoding started as it is drawn."""
        for shard in self.writer.shards_of(self.redo):
            rows = self.writer.rows(shard)
            parts = batch_slots(rows, self.redo, self.batch_size)
            self.open_shards[shard] = _OpenShard(batches_left=len(parts))
            for slots in parts:
                yield _Batch(shard, slots, [self._decode(rows[slot]) for slot in slots])

    def _decode(self, row: int) -> Future:
        return self.decoders.submit(self.dataset.waveform, row, self.samples)

    def _encode(self, batch: _Batch) -> _Encoded:
        """Encode the clips of a batch that could be decoded. Runs in an encoder thread.

        Silence is encoded in the place of the others, and dropped: another batch size could change a clip's last bit.
        """
        waveforms, encoded, good = np.zeros((len(batch.audio), self.samples), dtype=np.float32), _Encoded(), []
        for place, (slot, future) in enumerate(zip(batch.slots, batch.audio, strict=True)):
            try:
                waveforms[place], real = future.result()
            except AudioError as error:
                encoded.errors[slot] = str(error)
                continue
            good.append(place)
            encoded.slots.append(slot)
            encoded.valid_frames.append(real_frames(real, self.samples))
        batch.audio.clear()
        if good:
            started = time.perf_counter()
            stored = encode_to_host(self.backbone, torch.from_numpy(waveforms), self.writer.spec.dtype)
            encoded.stored = stored.map(lambda tensor: tensor[good]) if encoded.errors else stored
            encoded.seconds = time.perf_counter() - started
        return encoded

    def _store(self, batch: _Batch, encoded: _Encoded) -> None:
        """Put a batch into its shard's block, and hand the block to the disk when it is full."""
        shard = self.open_shards[batch.shard]
        self.encode_seconds += encoded.seconds
        if shard.block is None:
            shard.block = self.writer.block(batch.shard, self.redo)
        redo = self.redo[np.array(self.writer.rows(batch.shard))]
        shard.block.errors |= {slot: error for slot, error in encoded.errors.items() if redo[slot]}
        if encoded.stored is not None:
            self._fill(shard.block, encoded, encoded.stored, redo)
        slots = np.array(batch.slots)[redo[batch.slots.start : batch.slots.stop]]
        done = int((shard.block.status[slots] == Status.DONE).sum())
        self.done += done
        self.failed += len(slots) - done
        self._report_progress()
        shard.batches_left -= 1
        if not shard.batches_left:
            self._wait_for_disk(SHARDS_BEHIND - 1)  # a slow disk slows extraction and fills no memory
            del self.open_shards[batch.shard]
            self.writing.append(self.disk.submit(self.writer.write, batch.shard, shard.block))

    def _fill(self, block: ShardBlock, encoded: _Encoded, stored: Stored, redo: np.ndarray) -> None:
        """Copy what was encoded into the block, where it was asked for and is finite."""
        slots = np.array(encoded.slots)
        if stored.redone is not None:
            self.redone += int((stored.redone.numpy() & redo[slots]).sum())
        finite = stored.finite.numpy()
        good = finite.all(axis=1) & redo[slots]
        at = slots[good]
        keep = slice(None) if good.all() else good
        block.features[at] = stored.features.numpy()[keep]
        block.mean[at] = stored.mean.numpy()[keep]
        if block.scale is not None and stored.scale is not None:
            block.scale[at] = stored.scale.numpy()[keep]
        block.valid_frames[at] = np.array(encoded.valid_frames)[good]
        block.status[at] = Status.DONE
        for row in np.flatnonzero(~finite.all(axis=1) & redo[slots]):
            layer = int(np.flatnonzero(~finite[row])[0]) + 1
            block.errors[int(slots[row])] = self._overflow_message(layer)

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


def _take_ready(window: deque[_Batch]) -> _Batch:
    """Remove and return the earliest batch whose audio is ready; wait for one if there is none."""
    while True:
        for batch in window:
            if batch.ready():
                window.remove(batch)
                return batch
        waiting = [future for batch in window for future in batch.audio if not future.done()]
        wait(waiting, return_when=FIRST_COMPLETED)
