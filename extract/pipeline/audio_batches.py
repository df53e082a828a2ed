"""Batches of decoded clips in memory that is shared with the decoding processes: a bounded number, used in turn."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from whisper_at_cli.extract.audio.sources import ClipSource
from whisper_at_cli.extract.pipeline.decode_pool import GROUP, STILL_SECONDS, DecodePool, Job
from whisper_at_cli.extract.pipeline.decode_worker import FAILED, Outcome, Request, read_into_memory

SLOWEST = 10.0  # seconds of audio that are decoded in one, at the least, on the way to a clip deep in a file


@dataclass(frozen=True)
class Batch:
    """Clips that are encoded together: places within one shard."""

    shard: int
    slots: range


class DecodedBatch(NamedTuple):
    """Audio of a batch, decoded. `waveforms` is lent until the batch is released."""

    batch: Batch
    waveforms: np.ndarray  # (clips, samples) int16; zeros for a clip that failed
    outcomes: list[Outcome]  # (DONE, Heard) or (FAILED, why) for each clip


class Sources(Protocol):
    """Where the audio of the cache's rows lies. A Dataset is one."""

    def source(self, row: int) -> ClipSource: ...


class Feed(Protocol):
    """What an extraction takes its decoded batches from. All methods but `wake` are for one thread."""

    def free(self) -> bool:
        """Whether another batch may be started."""
        ...

    def start(self, batch: Batch, rows: Sequence[int]) -> None:
        """Have the audio of a batch decoded, which are these rows of the cache."""
        ...

    def take(self) -> DecodedBatch | None:
        """A batch that is decoded, if there is one."""
        ...

    def wait(self) -> None:
        """Return once another batch has been decoded since the last call, or `wake` was called."""
        ...

    def wake(self) -> None: ...

    def release(self, batch: Batch) -> None:
        """Its memory may be used again."""
        ...


class AudioBatches:
    """Batches that a pool of processes decodes into shared memory, a Feed.

    At most `count` batches of at most `batch_size` clips of `samples` samples exist at a time. With `pinned` the memory
    is registered with CUDA, so that it is copied to the device without waiting.
    """

    def __init__(
        self, pool: DecodePool, clips: Sources, *, samples: int, batch_size: int, count: int, pinned: bool = False
    ):
        self.pool, self.clips, self.samples = pool, clips, samples
        size = 2 * samples * batch_size
        self._stride = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = np.frombuffer(pool.share(self._stride * count), np.uint8)
        self._places = deque(range(count))
        self._at_work: dict[Job, tuple[Batch, int]] = {}
        self._lent: dict[Batch, int] = {}
        self._registered = pinned and _register(self._memory)

    def free(self) -> bool:
        return bool(self._places)

    def start(self, batch: Batch, rows: Sequence[int]) -> None:
        place, sources = self._places.popleft(), [self.clips.source(row) for row in rows]
        first = place * self._stride
        requests = [Request(source, self.samples, first + 2 * self.samples * at) for at, source in enumerate(sources)]
        deepest = max(getattr(source, "end", None) or getattr(source, "start", None) or 0.0 for source in sources)
        job = Job(read_into_memory, requests, STILL_SECONDS + deepest / SLOWEST)
        self._at_work[job] = batch, place
        self.pool.submit(job)

    def take(self) -> DecodedBatch | None:
        if not self.pool.finished:
            return None
        job = self.pool.finished.popleft()
        batch, place = self._at_work.pop(job)
        self._lent[batch] = place
        clips = len(job.requests)
        data = self._memory[place * self._stride :][: 2 * clips * self.samples]
        waveforms = data.view(np.int16).reshape(clips, self.samples)
        for at, (kind, _) in enumerate(job.outcomes):
            if kind == FAILED:  # its process may have died in the middle of it
                waveforms[at] = 0
        return DecodedBatch(batch, waveforms, job.outcomes)

    def wait(self) -> None:
        self.pool.wait()

    def wake(self) -> None:
        self.pool.wake()

    def release(self, batch: Batch) -> None:
        self._places.append(self._lent.pop(batch))

    def close(self) -> None:
        """Give the memory back to whoever uses the pool next. Nothing may be at work."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._memory.ctypes.data)
            self._registered = False


def batches_for(workers: int, batch_size: int) -> int:
    """How many batches must be at work for every one of `workers` processes to have two groups of requests."""
    group = max(1, min(GROUP, -(-batch_size // workers)))
    return -(-2 * workers * group // batch_size)


def _register(memory: np.ndarray) -> bool:
    """Have CUDA copy straight from this memory. Where it will not, copies wait, and that is all."""
    return int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0
