"""What runs on the workers of a Ray cluster: encoders, which take whole shards, and tasks that decode."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.audio.sources import ClipSource
from whisper_at_cli.extract.backbones.custom import clip_samples
from whisper_at_cli.extract.cache.writer import CacheWriter
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.pipeline import decode_worker
from whisper_at_cli.extract.pipeline.audio_batches import Batch, DecodedBatch
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.prepare import compile_backbone
from whisper_at_cli.extract.pipeline.shard_run import BATCHES_AHEAD, ShardRun


@dataclass(frozen=True)
class EncoderInfo:
    """What an encoder says of itself; stands for its backbone where the cache is made."""

    name: str
    weights_sha256: str
    layers: int
    dim: int
    precision: str
    device: str
    samples: int  # of a clip of the length that was asked for
    batch_size: int
    node: str
    note: str | None  # for the user


@dataclass(frozen=True)
class Shard:
    """What an encoder needs to know of a shard: which cache, which of its clips, in which batches."""

    cache: str
    slot: tuple[int, int]  # of the process that hands it out
    number: int
    todo: tuple[int, ...]  # clips of the cache
    samples: int
    batch_size: int


@dataclass(frozen=True)
class Outcome:
    """What came of a shard."""

    status: np.ndarray  # (clips of the shard,) uint8
    written: int
    encode_seconds: float
    disk_wait_seconds: float
    redone: int  # clips encoded again in float32
    note: str | None  # for the user


class Encoder:
    """The actor: a backbone on one GPU or core. On a GPU two shards are encoded side by side, as the local engine does
    with two batches; on a core one after the other."""

    def __init__(self, *, model: str | Path, device: str, precision: str, compile: bool, dtype: str):
        from whisper_at_cli.extract.backbones.load import load_backbone

        self.backbone = load_backbone(model, device=device, precision=precision)
        self.compile, self.dtype = compile, dtype
        self.writers: dict[str, CacheWriter] = {}
        self.pools = threading.local()  # of one process, for each thread that extracts

    def describe(self, clip_seconds: float) -> EncoderInfo:
        import ray

        from whisper_at_cli.extract.backbones.precision import cost_note
        from whisper_at_cli.extract.devices import fitting_batch_size

        b = self.backbone
        samples = clip_samples(b, clip_seconds)
        node = ray.util.get_node_ip_address() + "/" + ray.get_runtime_context().get_node_id()[:6]
        return EncoderInfo(
            name=b.name, weights_sha256=b.weights_sha256, layers=b.layers, dim=b.dim, precision=b.precision,
            device=str(b.device), samples=samples, batch_size=fitting_batch_size(b, samples, self.dtype), node=node,
            note=cost_note(b),
        )  # fmt: skip

    def extract_shard(self, shard: Shard, clips: PartOfDataset | None, *decoded: Decoded) -> Outcome:
        """Encode and write one shard, from its clips or from audio that was decoded elsewhere."""
        from whisper_at_cli.extract.devices import FITTING

        if shard.cache not in self.writers:
            self.writers[shard.cache] = CacheWriter.join(shard.cache, shard.slot)
        writer = self.writers[shard.cache]
        if self.compile:
            compile_backbone(self.backbone, shard.batch_size)
        redo = np.zeros(len(writer.cache), dtype=bool)
        redo[list(shard.todo)] = True
        run = ShardRun(
            self.backbone, writer, redo, samples=shard.samples, batch_size=shard.batch_size, streams=1
        )  # fmt: skip
        if clips is not None:
            run.from_pool(self._pool(), clips)
        else:
            run.all_shards(_DecodedClips(decoded), BATCHES_AHEAD)
        status = writer.cache.status[np.array(writer.rows(shard.number))]
        note = FITTING.note(self.backbone, shard.samples, shard.batch_size)
        return Outcome(status, run.done, run.encode_seconds, run.disk_wait_seconds, run.redone, note)

    def _pool(self) -> DecodePool:
        """This thread's pool; it goes with the actor."""
        if not hasattr(self.pools, "pool"):
            self.pools.pool = DecodePool(1)
        return self.pools.pool


@dataclass(frozen=True)
class Decoded:
    """Audio of some clips: rows of the cache, their waveforms, and what came of decoding each."""

    rows: tuple[int, ...]
    waveforms: np.ndarray  # (n, samples) int16; zeros for a clip that failed
    outcomes: list[decode_worker.Outcome]


class PartOfDataset:
    """Stands for the dataset where only some of its clips were sent: these rows of the cache."""

    def __init__(self, dataset: Dataset, rows: list[int]):
        self.clips, self.place = dataset.part(rows), {row: place for place, row in enumerate(rows)}

    def source(self, row: int) -> ClipSource:
        return self.clips.source(self.place[row])


class _DecodedClips:
    """A Feed of audio that is there already."""

    def __init__(self, parts: tuple[Decoded, ...]):
        self.parts = {row: (part, place) for part in parts for place, row in enumerate(part.rows)}
        self.ready: deque[DecodedBatch] = deque()
        self.woken = threading.Semaphore(0)

    def free(self) -> bool:
        return len(self.ready) < BATCHES_AHEAD

    def start(self, batch: Batch, rows: Sequence[int]) -> None:
        found = [self.parts[row] for row in rows]
        waveforms = np.stack([part.waveforms[place] for part, place in found])
        self.ready.append(DecodedBatch(batch, waveforms, [part.outcomes[place] for part, place in found]))

    def take(self) -> DecodedBatch | None:
        return self.ready.popleft() if self.ready else None

    def wait(self) -> None:
        self.woken.acquire()

    def wake(self) -> None:
        self.woken.release()

    def release(self, batch: Batch) -> None:
        """Each batch has memory of its own."""


def decode_clips(clips: Dataset, rows: tuple[int, ...], samples: int) -> Decoded:
    """The task: audio of a dataset's clips, which are these rows of the cache."""
    waveforms = np.empty((len(rows), samples), dtype=np.int16)
    outcomes = [decode_worker.read_clip(clips.source(at), waveforms[at]) for at in range(len(rows))]
    return Decoded(rows, waveforms, outcomes)
