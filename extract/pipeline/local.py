"""Stage 1 in one process: decode -> batch -> encode -> write, overlapped and resumable.

Threads decode ahead of the encoder, as far as a bounded window of batches; one thread writes finished shards behind it.
Which clips share a batch depends on their place in the dataset alone, so that a resumed run encodes the same batches as
an uninterrupted one and stores the same bytes; batches whose audio is ready go first.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from whisper_at_cli import __version__
from whisper_at_cli.extract.backbones.custom import checked_backbone, clip_samples
from whisper_at_cli.extract.backbones.load import Backbone, load_backbone
from whisper_at_cli.extract.cache.schema import DEFAULT_SHARD_MB, FRAMES, CacheSpec, Status
from whisper_at_cli.extract.cache.storage import Stored, encode_to_host
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.cache.writer import CacheWriter, ShardBlock
from whisper_at_cli.extract.datasets import Dataset, open_dataset, windowed
from whisper_at_cli.extract.datasets.base import as_text
from whisper_at_cli.extract.devices import cores, fitting_batch_size, one_thread_per_operation, streams_of
from whisper_at_cli.extract.errors import MISSING, AudioError, UsageError
from whisper_at_cli.extract.progress import Progress

BATCHES_AHEAD = 3  # decoded or being decoded, beyond one for each stream
SHARDS_BEHIND = 2  # encoded and not yet on disk


def real_frames(real: int, samples: int) -> int:
    """How many of a clip's frames hold any of its `real` samples; the others are padding."""
    return -(-real * FRAMES // samples)


@dataclass(frozen=True)
class Failure:
    """A clip that could not be extracted."""

    id: str
    path: str
    error: str


@dataclass(frozen=True)
class ExtractReport:
    """What a run did. `written`, `skipped` and `failed` add up to `clips`, all counted in this run's share.

    Of the failed clips, `missing` are those whose file is not there; `coverage` is the share of clips whose file is.
    `missing_expected` says that the dataset is one that nobody has whole.

    `encoder_busy` is the share of the time in which the encoder had work: 1 is as fast as this encoder gets, less means
    that it waited for decoding, or for the disk, which held it back for `disk_wait_seconds`.
    """

    cache: str
    clips: int
    written: int
    skipped: int
    failed: int
    failures: tuple[Failure, ...]
    seconds: float
    clips_per_second: float
    encoder_busy: float
    disk_wait_seconds: float
    missing: int = 0
    coverage: float = 1.0
    missing_expected: bool = False
    notes: tuple[str, ...] = ()  # on how the dataset was read

    @property
    def ok(self) -> bool:
        """Whether all was done that could be expected: missing clips may be, but not all of them."""
        excused = self.missing if self.missing_expected and self.missing < self.clips else 0
        return self.failed <= excused


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


def extract(
    dataset: str | Path | Dataset, cache: str | Path, *, model: str | Path | Backbone, format: str = "auto",
    labels: str | Path | None = None, window: float | None = None, hop: float | None = None,
    clip_seconds: float | None = None, dtype: str = "float16", precision: str = "float32", device: str = "auto",
    batch_size: int | None = None, workers: int | None = None, shard_mb: float = DEFAULT_SHARD_MB,
    shard: tuple[int, int] = (1, 1), repair: bool = False, compile: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:  # fmt: skip
    """Run a frozen encoder over a dataset once and keep every layer, pooled to 25 frames, in a cache.

    A cache that exists is continued. A clip that cannot be read is reported and marked failed; the others go on. One
    whose file was missing is done as soon as the file is there. With `repair`, clips that failed or that `verify` finds
    damaged are done again. With `window`, and `hop`, in seconds, every file is cut into clips of that length.
    Raises UsageError or CacheError where nothing can be done as asked.
    """
    started = time.perf_counter()
    check_numbers(batch_size=batch_size, workers=workers, shard_mb=shard_mb)
    dataset = open_clips(
        dataset, format=format, labels=labels, window=window, hop=hop, clip_seconds=clip_seconds, workers=workers
    )
    seconds = dataset.clip_seconds if clip_seconds is None else clip_seconds
    if isinstance(model, str | Path):
        backbone = load_backbone(model, device=device, precision=precision)
    else:
        backbone = checked_backbone(model, "model")
    samples = clip_samples(backbone, seconds)
    if compile:
        compile_backbone(backbone)
    size = batch_size or fitting_batch_size(backbone, samples)
    with open_cache(cache, dataset, backbone, seconds, dtype, size, shard_mb=shard_mb, slot=shard) as writer:
        if batch_size is None:
            size = batch_size_of(writer, size)
        redo = clips_to_do(writer, dataset, repair)
        run = ShardRun(dataset, backbone, writer, redo, samples, size, workers or cores(), progress)
        run.all_shards()
        return report_of(
            writer, dataset, run.done, time.perf_counter() - started, run.encoder_busy, run.disk_wait_seconds
        )


def open_cache(
    cache: str | Path, dataset: Dataset, backbone, clip_seconds: float, dtype: str, batch_size: int, *,
    shard_mb: float, slot: tuple[int, int],
) -> CacheWriter:  # fmt: skip
    """The cache of this extraction, new or continued. `backbone` is a Backbone or says the same of itself."""
    spec = CacheSpec(
        backbone=backbone.name, weights_sha256=backbone.weights_sha256, layers=backbone.layers, dim=backbone.dim,
        clip_seconds=clip_seconds, dtype=dtype, precision=backbone.precision, dataset=dataset.name,
        class_names=dataset.class_names,
    )  # fmt: skip
    provenance = _provenance(backbone, dataset, batch_size)
    return CacheWriter.create(cache, spec, dataset.table(), shard_mb=shard_mb, slot=slot, provenance=provenance)


def batch_size_of(writer: CacheWriter, size: int) -> int:
    """The batch size that began the cache, so that the same clips share a batch."""
    return writer.cache.attributes["made"].get("batch_size", size)


def compile_backbone(backbone: Backbone) -> None:
    """Have a backbone compile itself. Raises UsageError if it cannot."""
    if not hasattr(backbone, "compile"):
        raise UsageError(f"--compile is for Whisper; {backbone.name} cannot be compiled. Leave it out")
    backbone.compile()


def open_clips(
    dataset: str | Path | Dataset, *, format: str, labels: str | Path | None, window: float | None, hop: float | None,
    clip_seconds: float | None, workers: int | None = None,
) -> Dataset:  # fmt: skip
    """The dataset that was asked for, its files cut into windows where that was asked for too."""
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset, format=format, labels=labels)
    if window is None:
        if hop is not None:
            raise UsageError("hop says how far windows lie apart; give their length too (--window)")
        return dataset
    if clip_seconds not in (None, window):
        raise UsageError(f"windows of {window:g} s are clips of that length; leave out --clip-seconds {clip_seconds:g}")
    return windowed(dataset, window, hop, workers=workers)


def check_numbers(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not (0 < value < math.inf):
            raise UsageError(f"{name} is {value:g}, and must be above 0")


def clips_to_do(writer: CacheWriter, dataset: Dataset, repair: bool) -> np.ndarray:
    """(N,) bool: clips that are pending, or whose file was missing and is there now.

    With `repair` also all others that failed, and those that are damaged in this slot's shards.
    """
    todo = writer.cache.status == Status.PENDING
    if repair:
        damaged = {name for damage in verify(writer.path, rows=writer.mine()).damaged for name in damage.clips}
        todo |= (writer.cache.status == Status.FAILED) | np.isin(writer.cache.ids, list(damaged))
    else:
        todo |= _clips_found(writer, dataset)
    _say_where(writer, dataset, todo)
    return todo


def _clips_found(writer: CacheWriter, dataset: Dataset) -> np.ndarray:
    """(N,) bool: clips of this slot that failed because their file was missing, and it is there now."""
    found = np.zeros(len(dataset), dtype=bool)
    failed = np.flatnonzero(writer.mine() & (writer.cache.status == Status.FAILED))
    if len(failed):
        errors = writer.read_errors()
        missing = [row for row in failed.tolist() if str(errors[row]).startswith(MISSING)]
        found[[row for row in missing if dataset.is_there(row)]] = True
    return found


def _say_where(writer: CacheWriter, dataset: Dataset, redo: np.ndarray) -> None:
    """Paths that were not known when the cache was made: of clips whose file was missing.

    Those of all slots, so that processes that do this side by side write the same.
    """
    if not (redo & (writer.cache.status == Status.FAILED)).any():
        return
    failed = np.flatnonzero(writer.cache.status == Status.FAILED)
    paths = {row: as_text(dataset.clips[row].path) for row in failed.tolist()}
    moved = [row for row, path in paths.items() if path != writer.cache.paths[row]]
    if moved:
        writer.update_paths(np.array(moved), [paths[row] for row in moved])


def _provenance(backbone, dataset: Dataset, batch_size: int) -> dict:
    return {
        "tool_version": __version__,
        "torch_version": torch.__version__,
        "device": str(backbone.device),
        "batch_size": batch_size,
        "dataset_root": dataset.place,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


def batch_slots(rows: range, redo: np.ndarray, batch_size: int) -> list[range]:
    """The batches of a shard of these rows that hold a clip in `redo`, (N,) bool; as places within the shard."""
    parts = [range(at, min(at + batch_size, len(rows))) for at in range(0, len(rows), batch_size)]
    return [slots for slots in parts if redo[rows[slots.start] : rows[slots.stop - 1] + 1].any()]


class ShardRun:
    """One extraction: audio decoded ahead of the encoder, and encoded shards written behind it.

    One thread (the caller's) hands out the work and fills the shards; decoding, encoding and writing have threads of
    their own. On a CPU, each core encodes its own batches with one thread, which wastes nothing on waiting for others.
    """

    def __init__(
        self, dataset: Dataset, backbone: Backbone, writer: CacheWriter, redo: np.ndarray, samples: int,
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
        self.done = self.failed = 0
        self.encode_seconds = self.disk_wait_seconds = self.seconds = 0.0
        self.redo = redo
        self.total = int(writer.mine().sum())
        self.skipped = int((writer.mine() & ~redo).sum())

    def all_shards(self) -> None:
        """Extract the clips in `redo` that this slot holds."""
        started = time.perf_counter()
        self._report_progress()
        waiting, decoding, encoding = self._batches(), deque(), {}
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

    def _batches(self):
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
        """Encode the clips of a batch that could be decoded. Runs in an encoder thread."""
        clips, encoded = [], _Encoded()
        for slot, future in zip(batch.slots, batch.audio, strict=True):
            try:
                clip, real = future.result()
            except AudioError as error:
                encoded.errors[slot] = str(error)
                continue
            clips.append(clip)
            encoded.slots.append(slot)
            encoded.valid_frames.append(real_frames(real, self.samples))
        batch.audio.clear()
        if clips:
            waveforms = torch.from_numpy(np.stack(clips))
            started = time.perf_counter()
            encoded.stored = encode_to_host(self.backbone, waveforms, self.writer.spec.dtype)
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
            self._fill(shard.block, encoded, redo)
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

    def _fill(self, block: ShardBlock, encoded: _Encoded, redo: np.ndarray) -> None:
        """Copy what was encoded into the block, where it was asked for and is finite."""
        stored, slots = encoded.stored, np.array(encoded.slots)
        finite = stored.finite.numpy()
        good = finite.all(axis=1) & redo[slots]
        at = slots[good]
        keep = slice(None) if good.all() else good
        block.features[at] = stored.features.numpy()[keep]
        block.mean[at] = stored.mean.numpy()[keep]
        if stored.scale is not None:
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
        return f"{message}; extract with --precision float32" if self.backbone.precision == "float16" else message

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


def report_of(
    writer: CacheWriter, dataset: Dataset, written: int, seconds: float, encoder_busy: float, disk_wait_seconds: float
) -> ExtractReport:
    """What a run over this slot's clips did, from what the cache says now."""
    mine, status, clips = writer.mine(), writer.cache.status, dataset.clips
    failed_rows = np.flatnonzero(mine & (status == Status.FAILED))
    errors = writer.cache.errors
    failures = tuple(Failure(clips[row].id, clips[row].path, str(errors[row])) for row in failed_rows)
    missing, clips_here = sum(failure.error.startswith(MISSING) for failure in failures), int(mine.sum())
    return ExtractReport(
        cache=str(writer.path), clips=clips_here, written=written,
        skipped=int((mine & (status == Status.DONE)).sum()) - written, failed=len(failures), failures=failures,
        missing=missing, coverage=1 - missing / max(1, clips_here), missing_expected=dataset.missing_expected,
        notes=dataset.notes, seconds=round(seconds, 3), clips_per_second=round(written / max(seconds, 1e-9), 2),
        encoder_busy=round(encoder_busy, 3), disk_wait_seconds=round(disk_wait_seconds, 3),
    )  # fmt: skip
