"""What runs on the workers of a Ray cluster: encoders, which take whole shards, and tasks that decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.backbones.custom import clip_samples
from whisper_at_cli.extract.cache.writer import CacheWriter
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.errors import AudioError
from whisper_at_cli.extract.pipeline.prepare import compile_backbone
from whisper_at_cli.extract.pipeline.shard_run import ShardRun


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
            self.writers[shard.cache] = CacheWriter.join(shard.cache)
        writer = self.writers[shard.cache]
        if self.compile:
            compile_backbone(self.backbone, shard.batch_size)
        redo = np.zeros(len(writer.cache), dtype=bool)
        redo[list(shard.todo)] = True
        run = ShardRun(
            clips or _DecodedClips(decoded),
            self.backbone,
            writer,
            redo,
            shard.samples,
            shard.batch_size,
            1,
            None,
            streams=1,
        )
        run.all_shards()
        status = writer.cache.status[np.array(writer.rows(shard.number))]
        note = FITTING.note(self.backbone, shard.samples, shard.batch_size)
        return Outcome(status, run.done, run.encode_seconds, run.disk_wait_seconds, run.redone, note)


@dataclass(frozen=True)
class Decoded:
    """Audio of some clips: rows of the cache, their waveforms, how many samples are real, and what failed."""

    rows: tuple[int, ...]
    waveforms: np.ndarray  # (n, samples) float32; zeros for a clip that failed
    real: tuple[int, ...]
    errors: dict[int, str]


class PartOfDataset:
    """Stands for the dataset where only some of its clips were sent: these rows of the cache."""

    def __init__(self, dataset: Dataset, rows: list[int]):
        self.clips, self.place = dataset.part(rows), {row: place for place, row in enumerate(rows)}

    def waveform(self, row: int, samples: int) -> tuple[np.ndarray, int]:
        return self.clips.waveform(self.place[row], samples)


class _DecodedClips:
    """Stands for the dataset where the audio is there already."""

    def __init__(self, parts: tuple[Decoded, ...]):
        self.parts = {row: (part, place) for part in parts for place, row in enumerate(part.rows)}

    def waveform(self, row: int, samples: int) -> tuple[np.ndarray, int]:
        part, place = self.parts[row]
        if row in part.errors:
            raise AudioError(part.errors[row])
        return part.waveforms[place], part.real[place]


def decode_clips(clips: Dataset, rows: tuple[int, ...], samples: int) -> Decoded:
    """The task: audio of a dataset's clips, which are these rows of the cache."""
    waveforms, real, errors = np.zeros((len(rows), samples), dtype=np.float32), [], {}
    for place, row in enumerate(rows):
        try:
            waveforms[place], count = clips.waveform(place, samples)
        except AudioError as error:
            errors[row], count = str(error), 0
        real.append(count)
    return Decoded(rows, waveforms, tuple(real), errors)
