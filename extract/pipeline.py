"""Stage 1 in one process: decode -> batch -> encode -> write, overlapped and resumable.

Threads decode ahead of the encoder, as far as a bounded window of batches; one thread writes finished shards behind it.
Which clips share a batch depends on their place in the dataset alone, so that a resumed run encodes the same batches as
an uninterrupted one and stores the same bytes; batches whose audio is ready go first.
"""

from __future__ import annotations

import os
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
from whisper_at_cli.extract.audio import load_clip
from whisper_at_cli.extract.backbones import Backbone, load_backbone
from whisper_at_cli.extract.cache.schema import DEFAULT_SHARD_MB, FRAMES, CacheSpec, Status
from whisper_at_cli.extract.cache.writer import CacheWriter, ShardBlock
from whisper_at_cli.extract.datasets import Dataset, open_dataset
from whisper_at_cli.extract.encoder import clip_samples
from whisper_at_cli.extract.errors import AudioError, UsageError
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.extract.storage import to_storage

CPU_BATCH_SIZE = 16
GPU_BATCH_SIZE = 128
BATCHES_AHEAD = 3  # decoded or being decoded, before the encoder
SHARDS_BEHIND = 2  # encoded and not yet on disk


@dataclass(frozen=True)
class Failure:
    """A clip that could not be extracted."""

    id: str
    path: str
    error: str


@dataclass(frozen=True)
class ExtractReport:
    """What a run did. `written`, `skipped` and `failed` add up to `clips`, all counted in this run's share."""

    cache: str
    clips: int
    written: int
    skipped: int
    failed: int
    failures: tuple[Failure, ...]
    seconds: float
    clips_per_second: float


@dataclass
class _Batch:
    """Clips that are encoded together: rows within one shard, and their audio as it is decoded."""

    shard: int
    slots: range  # within the shard
    audio: list[Future]

    def ready(self) -> bool:
        return all(future.done() for future in self.audio)


@dataclass
class _OpenShard:
    """A shard that is being filled."""

    block: ShardBlock
    batches_left: int
    rows: range = field(default=range(0))


def extract(
    dataset: str | Path | Dataset, cache: str | Path, *, model: str | Path | Backbone, format: str = "auto",
    clip_seconds: float | None = None, dtype: str = "float16", precision: str = "float32", device: str = "auto",
    batch_size: int | None = None, workers: int | None = None, shard_mb: float = DEFAULT_SHARD_MB,
    shard: tuple[int, int] = (1, 1), progress: Progress | None = None,
) -> ExtractReport:  # fmt: skip
    """Run a frozen encoder over a dataset once and keep every layer, pooled to 25 frames, in a cache.

    A cache that exists is continued. A clip that cannot be read is reported and marked failed; the others go on.
    Raises UsageError or CacheError where nothing can be done as asked.
    """
    started = time.perf_counter()
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset, format=format)
    seconds = dataset.clip_seconds if clip_seconds is None else clip_seconds
    samples = clip_samples(seconds)
    backbone = load_backbone(model, device=device, precision=precision) if isinstance(model, str | Path) else model
    spec = CacheSpec(
        backbone=backbone.name, weights_sha256=backbone.weights_sha256, layers=backbone.layers, dim=backbone.dim,
        clip_seconds=seconds, dtype=dtype, precision=backbone.precision, dataset=dataset.name,
        class_names=dataset.class_names,
    )  # fmt: skip
    size = batch_size or (GPU_BATCH_SIZE if backbone.device.type == "cuda" else CPU_BATCH_SIZE)
    if size < 1:
        raise UsageError(f"a batch holds at least one clip; {size} was asked for")
    with CacheWriter.create(
        Path(cache),
        spec,
        dataset.table(),
        shard_mb=shard_mb,
        slot=shard,
        provenance=_provenance(backbone, dataset, size),
    ) as writer:
        if batch_size is None:  # the batch size that began the cache, so that the same clips share a batch
            size = writer.cache.attributes["made"].get("batch_size", size)
        run = _Run(dataset, backbone, writer, samples, size, workers or os.cpu_count() or 1, progress)
        written = run.all_shards()
        return _report(writer, dataset, written, time.perf_counter() - started)


def _provenance(backbone: Backbone, dataset: Dataset, batch_size: int) -> dict:
    return {
        "tool_version": __version__,
        "torch_version": torch.__version__,
        "device": str(backbone.device),
        "batch_size": batch_size,
        "dataset_root": str(dataset.root.resolve()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


class _Run:
    """One extraction: the window of batches before the encoder and the shards behind it."""

    def __init__(
        self, dataset: Dataset, backbone: Backbone, writer: CacheWriter, samples: int, batch_size: int, workers: int,
        progress: Progress | None,
    ):  # fmt: skip
        self.dataset, self.backbone, self.writer = dataset, backbone, writer
        self.samples, self.batch_size, self.progress = samples, batch_size, progress
        self.workers = workers
        self.open_shards: dict[int, _OpenShard] = {}
        self.writing: deque[Future] = deque()
        self.done = self.failed = 0
        index, of = writer.slot
        mine = np.arange(len(writer.cache)) // writer.clips_per_shard % of == index - 1
        self.total = int(mine.sum())
        self.skipped = int((mine & (writer.cache.status != Status.PENDING)).sum())

    def all_shards(self) -> int:
        """Extract every pending shard of this slot; returns how many clips were written."""
        self._report_progress()
        decoders = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        disk = ThreadPoolExecutor(1, thread_name_prefix="write")
        try:
            window: deque[_Batch] = deque()
            waiting = self._batches(decoders)
            while True:
                while len(window) < BATCHES_AHEAD and (batch := next(waiting, None)):
                    window.append(batch)
                if not window:
                    break
                self._encode(_take_ready(window), disk)
            while self.writing:
                self.writing.popleft().result()
        finally:
            decoders.shutdown(wait=True, cancel_futures=True)
            disk.shutdown(wait=True)
        return self.done

    def _batches(self, decoders: ThreadPoolExecutor):
        """Every batch of every pending shard, its decoding started as it is drawn."""
        for shard in self.writer.pending_shards():
            rows = self.writer.rows(shard)
            starts = range(0, len(rows), self.batch_size)
            self.open_shards[shard] = _OpenShard(ShardBlock.empty(len(rows), self.writer.spec), len(starts), rows)
            for start in starts:
                slots = range(start, min(start + self.batch_size, len(rows)))
                yield _Batch(shard, slots, [decoders.submit(self._load, rows[slot]) for slot in slots])

    def _load(self, row: int) -> tuple[np.ndarray, int]:
        return load_clip(self.dataset.audio_path(self.dataset.clips[row]), self.samples)

    def _encode(self, batch: _Batch, disk: ThreadPoolExecutor) -> None:
        """Encode one batch into its shard's block, and hand the block to the disk when it is full."""
        shard = self.open_shards[batch.shard]
        slots, clips = [], []
        for slot, future in zip(batch.slots, batch.audio, strict=True):
            try:
                clip, real = future.result()
            except AudioError as error:
                self._fail(shard, slot, str(error))
                continue
            shard.block.valid_frames[slot] = -(-real * FRAMES // self.samples)
            slots.append(slot)
            clips.append(clip)
        if clips:
            self._store(shard, slots, torch.from_numpy(np.stack(clips)))
        self._report_progress()
        shard.batches_left -= 1
        if not shard.batches_left:
            while len(self.writing) >= SHARDS_BEHIND:  # a slow disk slows extraction and fills no memory
                self.writing.popleft().result()
            del self.open_shards[batch.shard]
            self.writing.append(disk.submit(self.writer.write, batch.shard, shard.block))

    def _store(self, shard: _OpenShard, slots: list[int], waveforms: torch.Tensor) -> None:
        stored = to_storage(self.backbone.encode(waveforms), self.writer.spec.dtype)
        block, finite = shard.block, stored.finite.cpu().numpy()
        good = finite.all(axis=1)
        at = np.array(slots)[good]
        keep = torch.from_numpy(good)
        block.features[at] = stored.features.cpu()[keep].numpy()
        block.mean[at] = stored.mean.cpu()[keep].numpy()
        if stored.scale is not None:
            block.scale[at] = stored.scale.cpu()[keep].numpy()
        block.status[at] = Status.DONE
        self.done += len(at)
        for row in np.flatnonzero(~good):
            layer = int(np.flatnonzero(~finite[row])[0]) + 1
            self._fail(shard, slots[row], self._overflow_message(layer))

    def _overflow_message(self, layer: int) -> str:
        message = f"layer {layer} holds a value that is not finite in {self.writer.spec.dtype}"
        if self.writer.spec.dtype != "float32":
            return f"{message}; extract with --dtype float32"
        return f"{message}; extract with --precision float32" if self.backbone.precision == "float16" else message

    def _fail(self, shard: _OpenShard, slot: int, error: str) -> None:
        shard.block.errors[slot] = error
        shard.block.valid_frames[slot] = 0
        self.failed += 1

    def _report_progress(self) -> None:
        if self.progress:
            note = f"{self.failed} failed" if self.failed else ""
            self.progress(self.skipped + self.done + self.failed, self.total, note)


def _take_ready(window: deque[_Batch]) -> _Batch:
    """Remove and return the earliest batch whose audio is ready; wait for one if there is none."""
    while True:
        for batch in window:
            if batch.ready():
                window.remove(batch)
                return batch
        waiting = [future for batch in window for future in batch.audio if not future.done()]
        wait(waiting, return_when=FIRST_COMPLETED)


def _report(writer: CacheWriter, dataset: Dataset, written: int, seconds: float) -> ExtractReport:
    index, of = writer.slot
    rows = np.arange(len(dataset))
    mine = rows // writer.clips_per_shard % of == index - 1
    status = writer.cache.status
    failed_rows = np.flatnonzero(mine & (status == Status.FAILED))
    errors = writer.cache.errors
    failures = tuple(Failure(dataset.clips[r].id, dataset.clips[r].path, str(errors[r])) for r in failed_rows)
    return ExtractReport(
        cache=str(writer.path), clips=int(mine.sum()), written=written,
        skipped=int((mine & (status == Status.DONE)).sum()) - written, failed=len(failures), failures=failures,
        seconds=round(seconds, 3), clips_per_second=round(written / max(seconds, 1e-9), 2),
    )  # fmt: skip
